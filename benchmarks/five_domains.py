"""Growth, prompts and replay against the same model without them, given the same number of training FLOPs.

    python benchmarks/five_domains.py DATA [--arms ours naive replay paper] [--out benchmarks/results/FILE.md]

DATA holds ``wb news reviews bio cs`` folders with ``train.jsonl`` and ``valid.jsonl``. Every arm is a run of
``configs/five-domains.yaml`` through the command line, in one folder of ``--runs``; a run that was cut off goes on.

* ``ours``: the configuration as it is.
* ``naive``: the same first model all along, no replay, no prompt, no recovery; each stage gets as many steps as the
  FLOPs of that stage of ``ours`` buy.
* ``replay``: as ``naive``, with prompts and replay; what growth alone adds.
* ``paper``: ``ours`` with the paper's own growth (random maps, duplicated layers, copy noise, optimizer reset).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from elle_mp.config import Config
from elle_mp.config_file import load_config
from elle_mp.models.flops import training_flops_per_token
from elle_mp.models.spec import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "five-domains.yaml"
ARMS = ("ours", "naive", "replay", "paper")


def run_arm(folder: Path, data: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs (or goes on with) one arm; its ``results.json``."""
    command = [sys.executable, "-m", "elle_mp", "pretrain", str(CONFIG), f"run.dir={folder}", f"run.data={data}"]
    subprocess.run([*command, *overrides], check=True, cwd=ROOT)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def matched_steps(config: Config, ours: dict[str, Any], prompts: int) -> list[str]:
    """Overrides that keep the first model and give every stage the FLOPs that it had in ``ours``."""
    spec = replace(ModelSpec.from_config(config, config.tokenizer.vocab_size), prompt_tokens=prompts)
    per_step = training_flops_per_token(spec) * config.model.seq_len * config.batch.global_
    overrides = []
    for index, stage in enumerate(ours["stages"]):
        overrides += [f"stream.{index}.steps={round(stage['flops'] / per_step)}", f"stream.{index}.recover.steps=0"]
        overrides += [f"stream.{index}.grow=null"]
    return overrides


def arm_overrides(arm: str, config: Config, ours: dict[str, Any] | None) -> list[str]:
    """What an arm changes in the configuration."""
    if arm == "ours":
        return []
    if arm == "paper":
        return ["growth.width=elle", "growth.depth=elle", "growth.moments=auto"]
    if ours is None:
        raise SystemExit(f"arm {arm} is matched to the FLOPs of 'ours': run that first")
    if arm == "naive":
        return ["prompts.tokens=0", "memory.replay=0", *matched_steps(config, ours, 0)]
    return matched_steps(config, ours, config.prompts.tokens)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Final perplexities of all arms, as Markdown."""
    domains = [stage["domain"] for stage in next(iter(results.values()))["stages"]]
    lines = [f"| arm | parameters | training FLOPs | {' | '.join(domains)} | AP | AP+ |"]
    lines.append("|---" * (len(domains) + 5) + "|")
    for arm, result in results.items():
        last = result["stages"][-1]
        flops = sum(stage["flops"] for stage in result["stages"])
        ppl = " | ".join(f"{last['ppl'][domain]:.1f}" for domain in domains)
        lines.append(
            f"| {arm} | {last['params'] / 1e6:.2f} M | {flops:.3g} | {ppl} | **{result['ap']:.2f}** | "
            f"**{result['ap_plus']:+.2f}** |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the arms and prints, and writes, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["ours", "naive"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "five-domains-arms")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = load_config(CONFIG)
    results: dict[str, dict[str, Any]] = {}
    for arm in options.arms:
        folder = options.runs / arm
        results[arm] = run_arm(folder, options.data.resolve(), arm_overrides(arm, config, results.get("ours")))
    text = table(results)
    print(text)
    if options.out:
        command = f"python benchmarks/five_domains.py DATA --arms {' '.join(options.arms)}"
        processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
        machine = f"{date.today()}, {processor}, {os.cpu_count()} cores"
        head = f"# Five domains at equal training FLOPs\n\n`{command}` ({machine}, torch {torch.__version__})\n\n"
        notes = "\n".join(line for line in (__doc__ or "").splitlines() if re.match(r"\* |  \S", line))
        options.out.write_text(f"{head}Final perplexity on each domain's valid text.\n\n{text}\n\n{notes}\n")


if __name__ == "__main__":
    main()
