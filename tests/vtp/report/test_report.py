"""The report: what it says, that it opens without a network, and that no run breaks it."""

import io
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from rich.console import Console

from vtp import checkpoint
from vtp.files import FileError
from vtp.model.widths import SITES
from vtp.pruning.gates import insert_gates, sites
from vtp.pruning.selection import make_plan
from vtp.report import comparison_rows, comparison_table, read_metrics, render_report, sections, write_report
from vtp.report.figures import PALETTE, SITE_ROLES
from vtp.report.numbers import AFTER, DENSE, OPTIMIZED, find_row, headline, magnitude, percent

VOID_TAGS = {"meta", "br", "img", "link", "hr", "input"}
STAGE = {"epochs": 2, "batch_size": 64, "lr": 5e-4, "l1": 1e-4, "ema_decay": None}
HOSTILE = '<script>alert("x")</script>'


def make_gates(blocks=2, width=12, seed=0):
    """Gate values around different means, so that a threshold at 0.7 removes some of every site."""
    rng = np.random.default_rng(seed)
    names = [f"blocks.{block}.{site}" for block in range(blocks) for site in SITES]
    return {name: rng.normal(0.8, 0.2, width * (4 if "fc2" in name else 1)) for name in names}


def make_fake_plan(gates, heads=3, threshold=0.7, **changes):
    kept = {name: tuple(np.flatnonzero(np.abs(g) > threshold).tolist()) for name, g in gates.items()}
    head_dim = len(gates["blocks.0.attn.proj"]) // heads

    def value_widths(block):
        index = np.array(kept[f"blocks.{block}.attn.proj"], dtype=np.int64) // head_dim
        return tuple(np.bincount(index, minlength=heads).tolist())

    fields = {
        "kept": kept, "widths": {name: len(g) for name, g in gates.items()}, "head_dim": head_dim,
        "threshold": threshold, "score": "gate", "scope": "global", "per_mac": False, "round_to": 1,
        "value_widths": value_widths,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def make_row(model, top1, share=1.0, latency=4.0):
    return {
        "model": model, "top1": top1, "params": int(710_000 * share), "macs": int(36_000_000 * share),
        "file_bytes": int(2_850_000 * share), "latency_ms": latency, "speedup": 4.0 / latency,
    }  # fmt: skip


def make_results():
    return {
        "rows": [
            make_row("dense", 90.15),
            make_row("sparse", 90.35),
            make_row("compact before fine-tuning", 87.6, 0.62, 2.7),
            make_row("compact after", 89.8, 0.62, 2.65),
        ],
        "reslice": [
            {"rate": rate / 10, "params": 7e5, "macs": 36e6 * (1 - rate / 11), "top1": 90 - rate**2}
            for rate in range(10)
        ],
        "environment": {"torch": "2.15.0", "cpu": "a CPU", "threads": 2, "latency_batch": 64},
    }


def make_metrics():
    records = []
    for stage in ("dense", "sparse", "finetune"):
        for epoch in (1, 2):
            loss = 1.0 / epoch
            record = {"stage": stage, "epoch": epoch, "epochs": 2, "train_loss": loss, "test_loss": loss}
            record |= {"test_top1": 80.0 + 5 * epoch} | ({"l1": 200.0 - epoch} if stage == "sparse" else {})
            records.append(record)
    return records


def make_run():
    """Arguments of `render_report` for a complete run."""
    gates = make_gates()
    return {
        "config": {"model": "small", "data": "pictures", "sparse": STAGE, "finetune": STAGE | {"lr": 3e-4}},
        "metrics": make_metrics(),
        "gates": gates,
        "plan": make_fake_plan(gates),
        "results": make_results(),
    }


@pytest.fixture
def run():
    return make_run()


@pytest.fixture(scope="module")
def page():
    return render_report(**make_run())


class Page(HTMLParser):
    """Collects tags, and fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text.append(data)


def visible_text(page):
    return re.sub(r"\s+", " ", "".join(Page(page).text))


# ------------------------------------------------------------------------------------------- the page


def test_page_refers_to_nothing_outside_itself(page):
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith("#"), f"{tag} {name}={value}"
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", page))
    assert "@import" not in page and "http:" not in page and "https:" not in page
    assert "default-src 'none'" in page


def test_page_is_well_formed_with_unique_ids_and_accessible_names(page):
    tags = Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for tag, a in tags if tag == "section"} <= set(ids)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in tags if tag == "th")
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(drawings) == 4 + 3 + 1
    assert all(drawing["role"] == "img" and len(drawing["aria-label"]) > 20 for drawing in drawings)
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags)


def test_every_colour_has_a_light_and_a_dark_value(page):
    used = set(re.findall(r"var\(--([\w-]+)\)", page)) - {"site", "mix", "key"}
    assert used <= PALETTE.keys()
    light, dark = page.split("prefers-color-scheme: dark", 1)
    assert all(
        f"--{role}: {PALETTE[role][0]}" in light and f"--{role}: {PALETTE[role][1]}" in dark for role in used
    )
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #\w+", drawings), (
        "a colour that does not follow the colour scheme"
    )


def test_same_run_gives_the_same_bytes(page):
    assert render_report(**make_run()) == page


def test_every_site_has_its_colour():
    assert tuple(SITE_ROLES) == SITES


def test_strings_from_files_are_escaped(run):
    run["config"] |= {HOSTILE: HOSTILE, "model": HOSTILE, "finetune": {**STAGE, HOSTILE: [HOSTILE]}}
    run["metrics"] += [
        {"stage": HOSTILE + "$x_1$", "epoch": 1, HOSTILE: HOSTILE, "test_top1": 3.0, "l1": 1.0}
    ]
    run["results"]["rows"].append({"model": HOSTILE, "top1": HOSTILE})
    run["results"]["environment"] = {HOSTILE: HOSTILE}
    run["plan"].score = HOSTILE
    page = render_report(**run)
    assert "<script" not in page and not any(tag == "script" for tag, _ in Page(page).tags)
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("blocks", [6, 24])
def test_any_depth_is_drawn_block_by_block(blocks):
    gates = make_gates(blocks)
    plan = make_fake_plan(gates)
    assert sections.widths(plan).count(f'<th scope="row">{blocks - 1}</th>') == 2, "layers and heads"
    assert sections.gates(gates, plan).count(f">{blocks - 1}</text>") == 4, "one row in each of four panels"


# ------------------------------------------------------------------------------------ words and numbers


def test_headline_states_what_was_removed_and_what_it_cost(run):
    what, facts, notes = headline(run["results"], run["plan"])
    removed = 1 - sum(map(len, run["plan"].kept.values())) / sum(run["plan"].widths.values())
    assert what == f"{100 * removed:.0f}% of dimensions removed"
    assert facts == ["62% of MACs left", "top-1 90.15 → 89.80", "1.5\N{MULTIPLICATION SIGN} faster"]
    assert notes == []


@pytest.mark.parametrize(
    ("top1", "latency", "expected"),
    [
        (89.0, 2.0, "costs 1.15 points"),
        (60.0, 2.0, "fine-tuning did not bring the accuracy back"),
        (90.0, 5.0, "1.2\N{MULTIPLICATION SIGN} slower than the dense model"),
        (90.0, 4.0, "no faster than the dense model"),
        (math.nan, 2.0, "top-1 was not measured for both"),
        (90.0, math.nan, "latency was not measured for both"),
    ],
    ids=["cost", "collapse", "slower", "no-faster", "no-accuracy", "no-latency"],
)
def test_headline_hides_no_bad_news(run, top1, latency, expected):
    run["results"]["rows"][-1] |= make_row("compact after", top1, 0.62, latency)
    _, facts, notes = headline(run["results"], run["plan"])
    assert any(expected in note for note in notes)
    assert "nan" not in " ".join(facts + notes)


def test_headline_gives_the_speed_of_the_model_as_it_is_served(run):
    dense, final = (find_row(run["results"], name) for name in (DENSE, AFTER))
    packed = {**final, "model": OPTIMIZED, "latency_ms": dense["latency_ms"] / 2.5, "speedup": 2.5}
    run["results"]["rows"].append(packed)
    _, facts, _ = headline(run["results"], run["plan"])
    assert facts[-1] == "2.5\N{MULTIPLICATION SIGN} faster with vtp.optimize"
    latency = f"{dense['latency_ms']:.2f} ms → {packed['latency_ms']:.2f} ms"
    assert latency in render_report(**run)


def test_headline_without_fine_tuning_says_so(run):
    del run["results"]["rows"][-1]
    _, facts, notes = headline(run["results"], run["plan"])
    assert "top-1 90.15 → 87.60" in facts
    assert "There was no fine-tuning" in notes[0]


def test_page_and_terminal_show_the_same_rows(run, page):
    rows = comparison_rows(run["results"])
    assert [row[0] for row in rows][-1] == "compact after fine-tuning"
    assert rows[-1][1:4] == ("89.80 (\N{MINUS SIGN}0.35)", "440.20 k (62%)", "22.32 M (62%)")
    console = Console(width=200, file=io.StringIO())
    console.print(comparison_table(run["results"]))
    terminal, text = console.file.getvalue(), visible_text(page)
    for cell in (cell for row in rows for cell in row):
        assert cell in terminal and cell in text
    assert "batch of 64 images" in terminal and "batch of 64 images" in text


def test_speed_up_is_said_to_be_no_ratio_of_the_medians_beside_it(run, page):
    for text in (comparison_table(run["results"]).caption, visible_text(page)):
        assert "Speed-up: median of the rounds' own ratios" in text


def test_names_are_not_console_markup():
    console = Console(width=200, file=io.StringIO())
    console.print(comparison_table({"rows": [{"model": "[bold]x[/nothing]"}]}))
    assert "[bold]x[/nothing]" in console.file.getvalue()


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (1.0, "100%"), (0.999, "99.9%"), (0.0004, "0.04%"), (0.62, "62%")]
)
def test_percent_rounds_nothing_to_none_or_all(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"), [(17.56e9, "17.56 G"), (86.57e6, "86.57 M"), (4200, "4.20 k"), (7, "7")]
)
def test_magnitude_picks_the_prefix(value, text):
    assert magnitude(value) == text


# ----------------------------------------------------------------------------------- gates and the cut


def test_threshold_is_drawn_where_it_is_one_value_of_g(page):
    assert page.count(">threshold 0.7</text>") == 4


@pytest.mark.parametrize(
    "change",
    [
        {"score": "taylor"},
        {"scope": "per_layer"},
        {"per_mac": True},
        {"threshold": None, "round_to": 8},
    ],
    ids=["taylor", "per-layer", "per-mac", "rounded"],
)
def test_threshold_is_not_drawn_where_it_would_mislead(run, change):
    vars(run["plan"]).update(change)
    page = sections.gates(run["gates"], run["plan"])
    assert ">threshold 0" not in page and "no threshold is drawn" in page
    assert page.count("fill: var(--removed)") >= 8, "removed gates are grey all the same"


def test_plan_that_removes_nothing_has_no_grey_gates(run):
    run["plan"] = make_fake_plan(run["gates"], threshold=-1.0)
    run["plan"].threshold = None
    page = sections.gates(run["gates"], run["plan"])
    assert "The plan removes nothing" in page and "var(--removed)" not in page
    assert headline(run["results"], run["plan"])[0] == "No dimension removed"


def test_equal_gates_are_drawn_and_noted(run):
    run["gates"] = {name: np.ones_like(gate) for name, gate in run["gates"].items()}
    page = sections.gates(run["gates"], run["plan"])
    assert "All gates are equal (1)" in page and page.count("Histograms of the gates") == 4


def test_removed_heads_are_counted(run):
    run["gates"]["blocks.1.attn.proj"][:4] = 0.0
    run["plan"] = make_fake_plan(run["gates"])
    assert "1 of 6 heads" in sections.widths(run["plan"])


def test_plan_of_other_gates_is_refused(run):
    run["gates"]["blocks.1.mlp.fc1"] = np.ones(5)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1, 5 gates"):
        render_report(**run)


# ----------------------------------------------------------------------------------------- one-shot runs


def make_one_shot_run():
    run = make_run()
    del run["results"]["rows"][1], run["results"]["reslice"], run["config"]["sparse"]
    points = [
        {"macs": 4e6 * step, "params": 1e5 * step, "change": 10.0 ** (1 - step)} for step in range(1, 9)
    ]
    points.append({"macs": 36e6, "params": 7e5, "change": 0.0})
    run["results"]["pareto"] = {
        "change": "KL", "points": points, "chosen": {"macs": 22e6, "params": 4e5, "change": 3e-5}
    }  # fmt: skip
    run["config"]["one_shot"] = True
    run["metrics"] = [record for record in run["metrics"] if record["stage"] == "finetune"]
    run["gates"] = {}
    narrow = {"narrows_keys": True, "key_widths": lambda block: (3, 1, 2)}
    vars(run["plan"]).update(narrow, scope="optimal", threshold=None)
    return run


def test_report_of_a_one_shot_run_has_its_front_and_key_widths_and_no_sparse_stage():
    page = render_report(**make_one_shot_run())
    text = visible_text(page)
    assert "Predicted change of the output (KL) over MACs" in text and ">this run</text>" in page
    assert "22.00 M (61%), this run" in text and "Heads (key width)" in text and "Heads (value width)" in text
    assert "sparse" not in text and "gate" not in text and "|g|" not in text
    assert '<th scope="col" class=number>finetune</th>' in page, "the one stage is shown as a stage"


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        (None, "no “pareto”"),
        ({"points": [{"macs": 1e6}, {"change": 2}]}, "no point with numbers"),
        (
            {"points": [{"macs": 4e6, "change": 0.1}], "chosen": {"macs": 4e6, "change": None}},
            "is not marked",
        ),
    ],
    ids=["none", "no-numbers", "not-chosen"],
)
def test_front_that_is_not_whole_is_noted(front, expected):
    run = make_one_shot_run()
    run["results"]["pareto"] = front
    assert expected in visible_text(sections.pareto(run["results"]))


# --------------------------------------------------------------------------------- incomplete and broken


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ({"config": {}}, "No configuration"),
        ({"metrics": []}, "No epoch was recorded"),
        ({"gates": {}}, "no sparse-trained model"),
        ({"plan": None}, "No plan"),
        ({"results": {}}, "results.json has no results"),
        ({"config": {}, "metrics": [], "gates": {}, "plan": None, "results": {}}, "without a pruned model"),
    ],
    ids=["config", "metrics", "gates", "plan", "results", "everything"],
)
def test_missing_pieces_become_notes(run, missing, expected):
    text = visible_text(render_report(**{**run, **missing}))
    assert expected in text and "nan" not in text.lower().split()


def test_missing_parts_of_the_results_become_notes(run):
    run["results"] = {"rows": [*run["results"]["rows"][:1], {"model": "compact after"}]}
    text = visible_text(render_report(**run))
    assert "not cut at other rates" in text and "on what machine" in text
    assert "Not in results.json: sparse, compact before fine-tuning." in text


def test_values_that_are_not_finite_are_left_out_and_counted(run):
    run["results"]["reslice"][3]["top1"] = math.nan
    run["results"]["reslice"][4].pop("macs")
    run["metrics"][0]["test_loss"] = math.nan
    run["metrics"][1]["test_loss"] = None
    run["metrics"][4].pop("test_top1")
    run["metrics"][5]["test_top1"] = "85"
    run["gates"]["blocks.0.mlp.fc2"][0] = math.nan
    text = visible_text(render_report(**run))
    assert "2 of 10 rates have no finite result" in text
    assert "“dense”: test_loss is missing or not finite in 2 of 2 epochs" in text
    assert "“finetune”: test_top1 is missing or not finite in 2 of 2 epochs" in text
    assert "1 gate is not finite" in text


def test_one_rate_and_no_known_dense_model_are_drawn(run):
    run["results"]["rows"] = [make_row("dense", 90.0) | {"macs": 0}]
    run["results"]["reslice"] = [
        {"rate": 0.1, "macs": 30e6, "top1": 89.0},
        {"rate": 0.2, "macs": 0, "top1": 1},
    ]
    text = sections.reslice(run["results"])
    assert "MACs of the dense model are not known" in text and "1 of 2 rates" in text and "<svg" in text


def test_stages_that_did_not_run_or_finish_are_noted(run):
    run["metrics"] = [{**record, "epochs": 5} for record in run["metrics"] if record["stage"] == "sparse"]
    text = sections.training(run["metrics"], run["results"])
    assert "No dense stage" in text and "Stage “sparse” has 2 of 5 epochs" in text


def test_an_epoch_run_twice_counts_once(run):
    again = {**run["metrics"][-1], "test_top1": 88.0}
    resumed = sections.training([*run["metrics"], again], run["results"])
    assert resumed == sections.training([*run["metrics"][:-1], again], run["results"])


def test_plan_without_heads_has_a_map_of_layers_only(run):
    run["plan"].value_widths = lambda block: ()
    page = sections.widths(run["plan"])
    assert "no map of heads" in page and page.count('<table class="map">') == 1


@pytest.mark.parametrize(
    ("key", "value"), [("rows", {"a": 1}), ("rows", [1]), ("reslice", "x"), ("environment", [1])]
)
def test_results_of_another_shape_are_refused_by_name(run, key, value):
    run["results"][key] = value
    with pytest.raises(ValueError, match=key):
        render_report(**run)


@pytest.mark.parametrize("line", ['{"stage": "spar', "[1, 2]", "nonsense"], ids=["cut-off", "list", "text"])
def test_malformed_metrics_name_file_and_line(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"stage": "dense"}\n\n' + line + "\n")
    with pytest.raises(FileError, match=r"metrics\.jsonl, line 3"):
        read_metrics(file)


# ------------------------------------------------------------------------------------------ run folders


@pytest.fixture
def run_dir(tmp_path):
    """A run folder as the pipeline leaves it, of a tiny model with random gates."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=4
    )
    gated = insert_gates(model)
    for layer in sites(gated).values():
        torch.nn.init.normal_(layer.gate, 0.8, 0.2)
    checkpoint.save(gated, tmp_path / "sparse.safetensors")
    make_plan(gated, rate=0.4).save(tmp_path / "plan.json")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in make_metrics()))
    (tmp_path / "results.json").write_text(json.dumps(make_results()))
    (tmp_path / "config.json").write_text(json.dumps({"model": "small", "sparse": STAGE, "finetune": STAGE}))
    return tmp_path


def test_run_folder_becomes_a_report(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = visible_text(path.read_text(encoding="utf-8"))
    assert "40% of dimensions removed" in text and "89.80" in text
    assert path.read_text(encoding="utf-8").count("threshold 0.") == 4
    before = path.read_bytes()
    assert write_report(run_dir).read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "results.json", "plan.json", "sparse.safetensors"])
def test_damaged_file_is_named_and_the_old_report_stays(run_dir, name):
    (run_dir / "report.html").write_text("old")
    (run_dir / name).write_bytes((run_dir / name).read_bytes()[:-20])
    with pytest.raises(ValueError, match=re.escape(name)):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "old"
    assert not list(run_dir.glob(".report*"))


def test_run_that_only_trained_gets_a_report(run_dir):
    for name in ("plan.json", "results.json", "sparse.safetensors"):
        (run_dir / name).unlink()
    assert "without a pruned model" in write_report(run_dir).read_text(encoding="utf-8")


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has none of config\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
