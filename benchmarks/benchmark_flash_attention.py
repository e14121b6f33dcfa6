"""Measure hf_flash against every attention that a PyTorch user could call instead, on one GPU.

    python benchmarks/benchmark_flash_attention.py                       # everything, under 8 minutes
    python benchmarks/benchmark_flash_attention.py --sections peers      # one section

Sections: ``peers`` (16k tokens, hidden size 2048, lengths 512 to 16384), ``short`` (128 to 1024 in CUDA graphs),
``d256``, ``grouped`` (heads of q that share one of k), ``dropout``, ``padding`` (mask and dropout, what BERT trains
with), ``packed`` (ragged lengths), ``bias`` (T5's, with gradient), ``extras`` (one term of the score at a time against
our plain cell), ``arch`` (the mma.sync kernels, HF_FLASH_ARCH=sm80, beside what the GPU chooses), ``standard`` (against
standard attention, 128 to 65536, drawn into two plots) and ``host`` (host time of one small call). Times are medians of
rounds in which the peers take turns.
At the end the rows are held against the goals of ``goals.py``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from cases import SECTIONS, Case, cases_of
from peers import PACKAGES, Peer, all_peers, peers_of
from plots import draw
from report import complaints, table, verdicts
from timing import Measured, host_microseconds
from tqdm import tqdm

LONGEST_CELL_S = 6.0  # no further round is begun after this, so that the longest sequences get three


def measure(case: Case, peers: list[Peer], rounds: int) -> tuple[list[dict], list[str]]:
    """(rows, who is left out and why) of one case. A peer that fails leaves its sentence in a row."""
    case.build()
    running, rows, left_out = {}, [], []
    for peer in peers_of(case, peers):
        own = case.plain() if peer.plain else case
        if reason := peer.cannot(own):
            left_out.append(f"{case.section}: {peer.name} {reason}")
            continue
        measured = None
        try:
            measured = Measured(own, peer.prepare(own), peer.environment)
            measured.warm_up()
            running[peer.name] = measured
        except Exception as error:  # out of memory, or a case that the peer rejects: both belong into the table
            lines = str(error).strip().splitlines() or [type(error).__name__]
            rows.append({**head_of(case, peer.name), "error": lines[0][:160]})
            if measured is not None:
                measured.release()
            error.__traceback__ = None  # its frames hold tensors
            torch.cuda.empty_cache()
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - begin > LONGEST_CELL_S:
            break
        for measured in running.values():
            measured.sample()
    for name, measured in running.items():
        forward, backward = measured.medians()
        own = measured.case
        ran = {} if own is case else {"ran": f"{own.variant} B{own.B} S{own.S}"}
        rows.append(
            {
                **head_of(case, name),
                **ran,
                "fwd_ms": round(forward, 4),
                "bwd_ms": round(backward, 4),
                "fwd_tflops": round(own.flops / forward / 1e9, 1),
                "bwd_tflops": round(2.5 * own.flops / backward / 1e9, 1),
                "peak_mib": round(measured.peak_mib, 1),
            }
        )
        measured.release()
    running.clear()
    case.drop()
    torch.cuda.empty_cache()
    return rows, left_out


def head_of(case: Case, peer: str) -> dict:
    return {
        "section": case.section,
        "peer": peer,
        "variant": case.variant,
        "dtype": str(case.dtype).removeprefix("torch."),
        "B": case.B,
        "S": case.S,
        "H": case.H,
        "D": case.D,
        "causal": case.causal,
        "dropout": case.dropout,
    }


def host_rows(peers: list[Peer]) -> list[dict]:
    """Host time of one call at B1 H12 S128 D64, forward and forward + backward, in microseconds."""
    case = Case("host", 1, 128, 12, 64, torch.float16)
    case.build()
    rows = []
    for peer in peers:
        if peer.name not in ("hf_flash", "sdpa (dispatch)"):
            continue
        call = peer.prepare(case)

        def both(call=call):
            torch.autograd.grad(call(), case.inputs, case.dout)

        both()
        row = {**head_of(case, peer.name), "fwd_us": round(host_microseconds(call), 1)}
        rows.append({**row, "both_us": round(host_microseconds(both), 1)})
    return rows


def release_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(peers: list[Peer]) -> dict:
    """What measured, for the head row: of the peers that are packages of their own those that could be imported."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split()
    import hf_flash

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "hf_flash": hf_flash.__version__,
        "peers": {
            name: release_of(name) for peer in peers if peer.name in PACKAGES for name in [peer.name.replace(" ", "-")]
        },
        "command": "python " + " ".join(sys.argv),
    }


def write(rows: list[dict], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=[*SECTIONS, "host"], choices=[*SECTIONS, "host"])
    parser.add_argument("--rounds", type=int, default=7, help="samples a cell and peer (default 7)")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these sequence lengths")
    parser.add_argument("--head-dims", type=int, nargs="+", help="only these head dimensions")
    parser.add_argument("--peers", nargs="+", help="only peers whose name contains one of these words")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out (it compiles for a while)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder for JSON and plots")
    parser.add_argument("--judge", type=Path, metavar="ROWS", help="measure nothing: print what such a file's rows say")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not arguments.judge and not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU; benchmarks/benchmark_cpu.py measures the CPU kernel")
    return arguments


def measure_all(arguments: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """Rows of every cell asked for, written to disk as they come, and who was left out."""
    peers, missing = all_peers(flex=not arguments.no_flex)
    if arguments.peers:
        peers = [p for p in peers if p.name == "hf_flash" or p.plain or any(word in p.name for word in arguments.peers)]
    cases = [case for section in arguments.sections if section != "host" for case in cases_of(section)]
    cases = [case for case in cases if not arguments.lengths or case.S in arguments.lengths]
    cases = [case for case in cases if not arguments.head_dims or case.D in arguments.head_dims]
    rows, left_out = [machine(peers)], [f"{name}: cannot be imported: {reason}" for name, reason in missing.items()]
    with torch.cuda.stream(torch.cuda.Stream()):
        for case in (bar := tqdm(cases, desc="cells", unit="cell")):
            bar.set_postfix_str(f"{case.section} D{case.D} S{case.S} {case.variant}", refresh=False)
            found, without = measure(case, peers, arguments.rounds)
            rows += found
            left_out += without
            write(rows, arguments.output)
        if "host" in arguments.sections:
            rows += host_rows(peers)
    return rows, list(dict.fromkeys(left_out))


def main() -> None:
    arguments = parse_arguments()
    began = time.perf_counter()
    if arguments.judge:
        rows, left_out = [json.loads(line) for line in arguments.judge.read_text().splitlines()], []
    else:
        rows, left_out = measure_all(arguments)
    head, *rows = rows
    text = "\n".join([*table(rows), *complaints(rows, left_out), *verdicts(rows)])
    print(text)
    if arguments.judge:
        return
    (arguments.output / "report.txt").write_text(text + "\n")
    for path in draw(rows, arguments.output, head["gpu"]) if "standard" in arguments.sections else ():
        print(f"wrote {path}")
    print(f"wrote {write([head, *rows], arguments.output)} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
