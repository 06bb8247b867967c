"""Token merging on compact models: exact where tokens are equal, fewer tokens and MACs everywhere else."""

import functools
import re
import runpy
from pathlib import Path

import pytest
import torch

import vtp
from tests.examples.test_prune_deit import example
from tests.support.models import FAMILIES, build, gated, image, relative_error

TOKEN_MERGING = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "merge_tokens.py"))
merge, merging, MergingBlock = (TOKEN_MERGING[name] for name in ("merge", "merging", "MergingBlock"))


@functools.cache
def compact(family="plain", rate=0.4, **settings):
    model = gated(build(FAMILIES[family]))
    return vtp.compact(model, vtp.make_plan(model, rate=rate, min_keep=0, **settings))


@functools.cache
def narrow():
    model = gated(build())
    return vtp.compact(model, vtp.make_plan(model, rate=0.3, key_width=2), images=image(model, batch=8))


MODELS = {
    "ragged": compact,
    "dead branches": lambda: compact(rate=0.85),
    "narrow keys": narrow,
    "registers": lambda: compact("registers"),
    "no class token": lambda: compact("average-pool"),
    "dense": build,
}


def by_hand(tokens, size, metric, count, prefix):
    """The same pairs, one image and one token at a time."""
    out, sizes = [], []
    for x, n, m in zip(tokens, size[..., 0], metric, strict=True):
        m = m / m.norm(dim=-1, keepdim=True)
        first, second = range(prefix, len(x), 2), range(prefix + 1, len(x), 2)
        best = {i: max(second, key=lambda j, i=i: float(m[i] @ m[j])) for i in first}
        gone = sorted(first, key=lambda i: -float(m[i] @ m[best[i]]))[:count]
        members = {j: [j, *(i for i in gone if best[i] == j)] for j in second}
        groups = (
            [[i] for i in range(prefix)]
            + [[i] for i in first if i not in gone]
            + [members[j] for j in second]
        )
        sizes.append(torch.stack([n[group].sum() for group in groups]))
        out.append(torch.stack([(x[g] * n[g, None]).sum(0) / n[g].sum() for g in groups]))
    return torch.stack(out), torch.stack(sizes)[..., None]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_pairs_are_those_of_bipartite_soft_matching(count, prefix):
    torch.manual_seed(count)
    tokens, metric = torch.randn(3, prefix + 11, 7).double(), torch.randn(3, prefix + 11, 5).double()
    size = torch.randint(1, 5, (3, prefix + 11, 1)).double()
    got, sizes = merge(tokens, size, metric, count, prefix)
    wanted, wanted_sizes = by_hand(tokens, size, metric, count, prefix)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(sizes, wanted_sizes)


def test_never_more_than_half_of_the_tokens_and_no_prefix_is_joined():
    tokens = torch.randn(2, 8, 4)
    got, size = merge(tokens, torch.ones(2, 8, 1), tokens, 99, prefix=1)
    assert got.shape == (2, 5, 4)
    assert torch.equal(got[:, 0], tokens[:, 0])
    assert torch.equal(size.sum(1), torch.full((2, 1), 8.0))


@pytest.mark.parametrize("kind", MODELS)
def test_without_pairs_to_join_nothing_changes(kind):
    model = MODELS[kind]()
    assert relative_error(merging(model, 0)(image(model)), model(image(model))) < 1e-12


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "no class token"])
def test_equal_tokens_are_joined_without_any_change(kind):
    """Attention counts a token as often as it has members, so nobody sees that two equal ones are one."""
    model = MODELS[kind]()
    torch.manual_seed(0)
    prefix = model.num_prefix_tokens
    pairs = torch.randn(2, 2, model.embed_dim).double().repeat_interleave(2, dim=1)
    tokens = torch.cat([torch.randn(2, prefix, model.embed_dim).double(), pairs], dim=1)
    merged = merging(model, 2).blocks
    got, whole = merged(tokens), model.blocks(tokens)
    assert got.shape[1] == prefix + 1  # two of four joined, and these in the second block
    assert relative_error(got[:, :prefix], whole[:, :prefix]) < 1e-12
    once = torch.nn.Sequential(*merging(model, 2).blocks[:1])(tokens)
    expected = model.blocks[0](tokens)
    assert once.shape[1] == prefix + 2
    assert relative_error(once[:, :prefix], expected[:, :prefix]) < 1e-12
    assert relative_error(once[:, prefix:], expected[:, prefix::2]) < 1e-12


def test_the_example_merges_tokens_of_a_compact_model():
    done = example("merge_tokens.py", "--toy", "--merge", "0", "4", "8", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    pattern = r"(\d+) pairs a block: (\d+) tokens at the end, ([\d.]+)M MACs \((\d+)%\), [\d.]+ ms"
    rows = re.findall(pattern, done.stdout)
    assert [(int(pairs), int(tokens)) for pairs, tokens, *_ in rows] == [(0, 65), (4, 49), (8, 33)]
    assert rows[0][3] == "100"
    assert float(rows[0][2]) > float(rows[1][2]) > float(rows[2][2])


def test_the_example_asks_for_a_model():
    done = example("merge_tokens.py")
    assert done.returncode == 2
    assert "--toy" in done.stderr
