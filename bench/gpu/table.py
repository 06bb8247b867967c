"""What a run prints last: one line for each case, with the bar that it has to reach beside each figure.

A bar is what the project sets out to reach; a run that misses one has not failed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.gating_cost import REFERENCE, REPEAT
from bench.gpu.cases import MEASURED, NOT_MEASURED, PARTS, Record

MOST_LINES = 110

FASTEST_OVER_OURS = {1: 1.3}  # time of the fastest other, by batch,
FASTEST_OVER_OURS_ELSE = 1.15  # and at all other batch sizes
DENSE_OVER_OURS, FROM_BATCH = 0.85, 32  # as a share of what the MACs promise
OF_PEAK = {("DeiT-B", 256): 0.5}  # of the card's measured peak
PADDED_OVER_LINEAR, PADDED_OVER_ATTENTION = 0.9, 1.0
GATED_OVER_PLAIN, GATED_MEMORY = 1.03, 1.005
SHARE_OF_MACS = 0.8


def table(results: Mapping[str, Any]) -> list[str]:
    """The lines, at most `MOST_LINES`."""
    lines = list(_lines(results))
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... {len(lines) - MOST_LINES + 1} more in the results file"]
    return lines


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    hardware, environment = results["hardware"], results["environment"]
    versions = f"driver {hardware['driver']}, CUDA {hardware['cuda']}, torch {environment['torch']}"
    versions += f", triton {results['triton']}"
    commit = (results["commit"] or "unknown")[:12] + " and changes" * bool(results["modified"])
    yield f"{hardware['gpu'] or environment['cpu']}, {versions}, {environment['date']}, commit {commit}"
    if results["rehearsal"]:
        yield "A REHEARSAL at toy size on the CPU: no figure here means anything"
    yield _cache_line(results["cache"])
    peak = _ceilings(results)
    for part in PARTS:
        if part.name not in results["parts"]:
            continue
        record = results["parts"][part.name]
        yield f"{part.name}, {record['seconds']:.0f} s"
        for name, case in record["cases"].items():
            if case["status"] == MEASURED:
                yield f"  {name}: {FORMATS[part.name](name, case, peak)}"
            else:
                yield f"  {name}: {case['status'][:120]}"


def _cache_line(cache: Record) -> str:
    line = "{found} of {kernels} kernels found compiled, {compiled} compiled".format(**cache)
    line += f", {len(cache['failed'])} failed" * bool(cache["failed"]) + f", {cache['seconds']:.0f} s"
    damaged = cache.get("damaged")
    return line + f"; the file compiled ahead is damaged ({damaged}): ignored" * (damaged is not None)


def _ceilings(results: Mapping[str, Any]) -> Record:
    found = results["parts"].get("models", {"cases": {}})["cases"].get("ceilings", {})
    return found if found.get("status") == MEASURED else {}


def _beside(value: float, bar: float, *, at_most: bool = False) -> str:
    reached = value <= bar if at_most else value >= bar
    return f"{value:.3g} ({'reaches' if reached else 'misses'} {bar:g})"


# --------------------------------------------------------------------------------
# A line for each kind of case


def _numerics(name: str, case: Record, peak: Record) -> str:
    if "passed" in case:
        return f"{case['passed']} passed, {case['skipped']} skipped"
    if "took" in case:
        own, cpu = (case["took"][where] for where in ("GPU", "CPU"))
        return "right; " + ", ".join(f"{what} {own[what]:.1f} s (CPU {cpu[what]:.1f})" for what in own)
    return "right"


def _models(name: str, case: Record, peak: Record) -> str:
    if "flops_per_second" in case:
        return f"{case['flops_per_second'] / 1e12:.0f} TFLOP/s, {case['bytes_per_second'] / 1e12:.2f} TB/s"
    if "kernels" in case:
        return _profile(case["kernels"])
    runtimes, batch = case["timed"], case["batch"]
    timed = {label: own for label, own in runtimes.items() if "median_seconds" in own}
    said = [_missing(runtimes)] if len(timed) < len(runtimes) else []
    if "ours" not in timed:
        return "; ".join(said)
    ours = timed.pop("ours")
    line = f"{batch / ours['median_seconds']:,.0f} images/s"
    if peak:
        share = 2 * ours["macs"] * batch / ours["median_seconds"] / peak["flops_per_second"]
        bar = OF_PEAK.get((name.partition(",")[0], batch))
        line += f", of peak {_beside(share, bar) if bar else f'{share:.2f}'}"
    ways = {label: own for label, own in timed.items() if label.startswith("ours, ")}
    timed = {label: own for label, own in timed.items() if label not in ways}
    for label, own in ways.items():
        line += f", {label.removeprefix('ours, ')} {own['over_reference']['median']:.2f}"
    if timed:
        fastest = min(timed, key=lambda label: timed[label]["over_reference"]["median"])
        ratio = timed[fastest]["over_reference"]["median"]
        bar = FASTEST_OVER_OURS.get(batch, FASTEST_OVER_OURS_ELSE)
        line += f", {_beside(ratio, bar)} times as fast as {fastest}"
    dense = next((own for label, own in timed.items() if label.startswith("dense, ")), None)
    if dense and batch >= FROM_BATCH:
        promised = dense["macs"] / ours["macs"]
        share = dense["over_reference"]["median"] / promised
        line += f", {_beside(share, DENSE_OVER_OURS)} of the {promised:.2f} that MACs promise"
    return "; ".join([line, *said])


def _profile(kernels: Sequence[Record]) -> str:
    spent = sum(kernel["seconds"] for kernel in kernels)
    shares = (f"{kernel['kernel'][:40]} {kernel['seconds'] / spent:.0%}" for kernel in kernels[:6])
    return f"{spent * 1e6:,.0f} us in kernels: " + ", ".join(shares)


def _missing(timed: Mapping[str, Record]) -> str:
    return ", ".join(
        f"{label} {own['status'][:60]}" for label, own in timed.items() if "median_seconds" not in own
    )


def _training(name: str, case: Record, peak: Record) -> str:
    if "share_of_macs" in case:
        said = []
        for path, share in case["share_of_macs"].items():
            ratio, inside = case["compact_over_dense"][path]["median"], case["kernel_seconds"][path]
            beside = _beside(share, SHARE_OF_MACS)
            said.append(
                f"{path} {ratio:.3f} ({inside * 1e3:.1f} ms in kernels), {beside} of what MACs promise"
            )
        return "compact over dense: " + "; ".join(said)
    found = case["variants"]
    plain, gated, naive, noise = (found[n] for n in (REFERENCE, "gated", "naive", REPEAT))
    others = "".join(
        f", {name.removeprefix('gated, ')} {record['ratio']['median']:.3f}"
        for name, record in found.items()
        if name.startswith("gated, ") and not record.get("failed")
    )
    return (
        f"step {plain['median_seconds'] * 1e3:.1f} ms, gated "
        f"{_beside(gated['ratio']['median'], GATED_OVER_PLAIN, at_most=True)}, memory "
        f"{_beside(gated['peak_ratio'], GATED_MEMORY, at_most=True)}, by hand "
        f"{naive['ratio']['median']:.3f}{others}, noise {noise['ratio']['median']:.3f}"
    )


def _ops(name: str, case: Record, peak: Record) -> str:
    others = {label: own for label, own in case["timed"].items() if "median_seconds" in own}
    if "ours" not in others:
        return _missing(case["timed"])
    ours, predicted = others.pop("ours")["median_seconds"], case["predicted"]
    line = f"{ours * 1e6:.1f} us"
    if predicted["status"] == "predicted":
        line += f" (predicted for an H100: at least {predicted['seconds_on_h100'] * 1e6:.1f})"
        if peak:
            floor = max(
                predicted["bytes"] / peak["bytes_per_second"], case["flops"] / peak["flops_per_second"]
            )
            line += f", {floor / ours:.0%} of the ceiling"
    ratios = {label: other["over_reference"]["median"] for label, other in others.items()}
    paths = {label: ratios.pop(label) for label in list(ratios) if label.startswith("ours, ")}
    for label, ratio in ratios.items():
        if bar := _op_bar(name, label):
            line += f", {label} {_beside(ratio, bar)}"
    for kind, found in (("fastest other", ratios), ("fastest path", paths)):
        if found:
            best = min(found, key=lambda label, found=found: found[label])
            line += f", {kind} {best.removeprefix('ours, ')} {found[best]:.2f}"
    return line


def _op_bar(name: str, other: str) -> float | None:
    if name.startswith("compact_linear") and other == "padded to 16":
        return PADDED_OVER_LINEAR
    if name.startswith("ragged_attention") and "padded" in other:
        return PADDED_OVER_ATTENTION
    return None


def _configurations(name: str, case: Record, peak: Record) -> str:
    entries = case["timed"]
    timed = {n: own["over_reference"]["median"] for n, own in entries.items() if "median_seconds" in own}
    if "now" not in timed:
        return f"the entry as it is: {entries['now']['status'][:90]}"
    best = min(timed, key=lambda label: timed[label])
    failed = f", {len(entries) - len(timed)} failed" * (len(timed) < len(entries))
    if best == "now":
        return f"{case['now']} is the fastest of {len(timed)}{failed}"
    return f"{best} takes {timed[best]:.3f} of the time of {case['now']}{failed}"


FORMATS: dict[str, Callable[[str, Record, Record], str]] = {
    "numerics": _numerics,
    "models": _models,
    "training": _training,
    "ops": _ops,
    "configurations": _configurations,
}


def failures(results: Mapping[str, Any]) -> Sequence[str]:
    """One line for each case, and each part of one, that failed: it computes something else, or broke."""
    found = []
    for part in results["parts"].values():
        for name, case in part["cases"].items():
            for label, record in {"": case, **case.get("timed", {})}.items():
                if record.get("status", NOT_MEASURED).startswith("failed"):
                    found.append(f"{name}{', ' * bool(label)}{label}: {record['status']}")
    return found
