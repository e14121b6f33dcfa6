"""Measure hf_flash against every attention that a PyTorch user could call instead, on one GPU.

    python benchmarks/benchmark_flash_attention.py                       # everything, under 8 minutes
    python benchmarks/benchmark_flash_attention.py --sections peers      # one section

Sections: ``peers`` (16k tokens, hidden size 2048, lengths 512 to 16384), ``short`` (128 to 1024 in CUDA graphs),
``dropout``, ``padding`` (mask and dropout, what BERT trains with), ``bias`` (T5's, with gradient), ``standard``
(against standard attention, 128 to 65536, drawn into two plots) and ``host`` (host time of one small call).
Times are medians of rounds in which the peers take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from peers import Case, Peer, all_peers
from plots import draw
from timing import Measured, host_microseconds
from tqdm import tqdm

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def cases_of(section: str) -> list[Case]:
    """The cells of a section."""
    half, bfloat = torch.float16, torch.bfloat16
    if section == "peers":
        return [
            Case(section, 16384 // s, s, 2048 // d, d, bfloat, causal=causal)
            for d, causal, s in product((64, 128), (False, True), LENGTHS)
        ]
    if section == "short":
        return [
            Case(section, 16384 // s, s, 2048 // d, d, bfloat, causal=causal, graph=True)
            for d, causal, s in product((64, 128), (False, True), (128, 256, 384, 512, 1024))
        ]
    if section == "dropout":
        return [Case(section, 8, s, 12, 64, half, dropout=0.1) for s in LENGTHS]
    if section == "padding":
        return [Case(section, 8, s, 12, 64, half, dropout=0.1, padding=True) for s in LENGTHS]
    if section == "bias":
        return [Case(section, 8, s, 12, 64, half, bias=True) for s in LENGTHS[:4]]
    if section == "standard":
        variants = ({}, {"causal": True}, {"dropout": 0.1}, {"dropout": 0.1, "padding": True})
        lengths = (128, 256, *LENGTHS, 32768, 65536)
        return [Case(section, 8, s, 12, 64, half, **variant) for variant, s in product(variants, lengths)]
    raise ValueError(f"unknown section {section!r}; sections are {', '.join(SECTIONS)} and host")


SECTIONS = ("peers", "short", "dropout", "padding", "bias", "standard")


def peers_of(case: Case, peers: list[Peer]) -> list[Peer]:
    """Standard attention is the yardstick of its own section and hf_flash alone stands beside it there."""
    if case.section == "standard":
        return [peer for peer in peers if peer.name in ("hf_flash", "standard")]
    return [peer for peer in peers if peer.name != "standard" or case.S <= 4096]


def measure(case: Case, peers: list[Peer], rounds: int) -> list[dict]:
    """Rows of one case. A peer that cannot compute it is left out; one that fails leaves its sentence."""
    case.build()
    running, rows = {}, []
    for peer in peers_of(case, peers):
        try:
            call = peer.prepare(case)
            if call is None:
                continue
            measured = Measured(case, call)
            measured.warm_up()
            running[peer.name] = measured
        except Exception as error:  # out of memory, or a case that the peer rejects: both belong into the table
            rows.append({**head_of(case, peer.name), "error": str(error).splitlines()[0][:160]})
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for measured in running.values():
            measured.sample()
    for name, measured in running.items():
        forward, backward = measured.medians()
        rows.append(
            {
                **head_of(case, name),
                "fwd_ms": round(forward, 4),
                "bwd_ms": round(backward, 4),
                "fwd_tflops": round(case.flops / forward / 1e9, 1),
                "bwd_tflops": round(2.5 * case.flops / backward / 1e9, 1),
                "peak_mib": round(measured.peak_mib, 1),
            }
        )
        measured.release()
    running.clear()
    case.drop()
    torch.cuda.empty_cache()
    return rows


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


def host_rows() -> list[dict]:
    """Host time of one call at B1 H12 S128 D64, forward and forward + backward, in microseconds."""
    case = Case("host", 1, 128, 12, 64, torch.float16)
    case.build()
    rows = []
    for peer in all_peers(flex=False)[:2]:
        call = peer.prepare(case)

        def both(call=call):
            torch.autograd.grad(call(), case.inputs, case.dout)

        both()
        row = {**head_of(case, peer.name), "fwd_us": round(host_microseconds(call), 1)}
        rows.append({**row, "both_us": round(host_microseconds(both), 1)})
    return rows


def machine() -> dict:
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
        "command": "python " + " ".join(sys.argv),
    }


def print_table(rows: list[dict]) -> None:
    """One line a case, forward/backward TFLOP/s a peer, the best of the others as ratio at the end."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "fwd_tflops" in row:
            cells.setdefault((row["section"], row["D"], row["variant"], row["S"]), {})[row["peer"]] = row
    names = list(dict.fromkeys(row["peer"] for row in rows if "fwd_tflops" in row))
    if not cells:
        return
    print(f"\n{'section':9} {'D':>3} {'variant':22} {'S':>6} " + " ".join(f"{name[:13]:>13}" for name in names))
    for (section, d, variant, s), by_peer in cells.items():
        values = (
            f"{by_peer[n]['fwd_tflops']:>6.0f}/{by_peer[n]['bwd_tflops']:<6.0f}" if n in by_peer else " " * 13
            for n in names
        )
        print(f"{section:9} {d:>3} {variant:22} {s:>6} " + " ".join(values))
    print("forward/backward TFLOP/s; the backward counts 2.5 times the forward's operations\n")
    for section in dict.fromkeys(key[0] for key in cells):
        for name in names[1:]:
            print_ratios(section, name, [by for key, by in cells.items() if key[0] == section])


def print_ratios(section: str, name: str, cells: list[dict[str, dict]]) -> None:
    pairs = [(by["hf_flash"], by[name]) for by in cells if "hf_flash" in by and name in by]
    if not pairs:
        return
    columns = []
    for label, value in (
        ("forward", lambda row: row["fwd_ms"]),
        ("backward", lambda row: row["bwd_ms"]),
        ("both", lambda row: row["fwd_ms"] + row["bwd_ms"]),
        ("memory", lambda row: row["peak_mib"]),
    ):
        ratios = [value(other) / max(value(own), 1e-9) for own, other in pairs]
        mean = math.exp(sum(math.log(max(r, 1e-9)) for r in ratios) / len(ratios))
        columns.append(f"{label} {mean:5.2f} (least {min(ratios):.2f})")
    print(f"{section:9} against {name:22} geometric means: " + ", ".join(columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=[*SECTIONS, "host"], choices=[*SECTIONS, "host"])
    parser.add_argument("--rounds", type=int, default=7, help="samples a cell and peer (default 7)")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these sequence lengths")
    parser.add_argument("--peers", nargs="+", help="only peers whose name contains one of these words")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out (it compiles for a while)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder for JSON and plots")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU; benchmarks/benchmark_cpu.py measures the CPU kernel")
    peers = all_peers(flex=not args.no_flex)
    if args.peers:
        peers = [p for p in peers if p.name == "hf_flash" or any(word in p.name for word in args.peers)]
    cases = [case for section in args.sections if section != "host" for case in cases_of(section)]
    cases = [case for case in cases if not args.lengths or case.S in args.lengths]

    rows = [row for case in tqdm(cases, desc="cells", unit="cell") for row in measure(case, peers, args.rounds)]
    if "host" in args.sections:
        rows += host_rows()
    args.output.mkdir(parents=True, exist_ok=True)
    head = machine()
    with open(args.output / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in [head, *rows])
    print_table(rows)
    for row in rows:
        if "fwd_us" in row:
            print(f"host time, one call: {row['peer']:16} forward {row['fwd_us']} us, both {row['both_us']} us")
        if "error" in row:
            print(f"failed: {row['section']} {row['variant']} D{row['D']} S{row['S']} {row['peer']}: {row['error']}")
    for path in draw(rows, args.output, head["gpu"]) if "standard" in args.sections else ():
        print(f"wrote {path}")
    print(f"wrote {args.output / 'rows.jsonl'}")


if __name__ == "__main__":
    main()
