"""Runs transformers' architectures through Precast and compares them with eager.

    python benchmarks/architectures.py --compiler eager     structure only, minutes
    python benchmarks/architectures.py                      really compiles, a minute each
    python benchmarks/architectures.py --only llama         prints, writes nothing

Tiny models with random weights, each called at several batch sizes and lengths. Writes
`docs/architectures.md`; exits with 1 where one fails or differs from eager.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf

import precast

#: Batch size and number of tokens of each call.
SHAPES = ((2, 9), (3, 17), (1, 9), (2, 2), (1, 1))
VOCABULARY = 96
#: Largest absolute difference from eager that is accepted; eager against eager is 0.
TOLERANCE = 2e-5
TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"

_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_SMALL: dict[str, Any] = {**_LAYERS, "vocab_size": VOCABULARY}
_PAIR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": VOCABULARY,
}


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (batch, length))


def _text(batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": _tokens(batch, length)}


def _decoder(batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": _tokens(batch, length), "use_cache": False}


def _text_to_text(batch: int, length: int) -> dict[str, Any]:
    decoded = {"decoder_input_ids": _tokens(batch, length), "use_cache": False}
    return {"input_ids": _tokens(batch, length), **decoded}


def _picture(batch: int, length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def _picture_and_text(batch: int, length: int) -> dict[str, Any]:
    return {**_text(batch, length), **_picture(batch, length)}


def _speech(batch: int, length: int) -> dict[str, Any]:
    decoded = {"decoder_input_ids": _tokens(batch, length), "use_cache": False}
    return {"input_features": torch.randn(batch, 20, 100), **decoded}


class Architecture(NamedTuple):
    """A model's class, its tiny configuration, and what makes a call's arguments."""

    model: type
    config: Any
    arguments: Callable[[int, int], dict[str, Any]]


def architectures() -> dict[str, Architecture]:
    """Return every architecture by name."""
    whisper = {**_PAIR, "max_source_positions": 50, "num_mel_bins": 20, "pad_token_id": 0}
    whisper |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    picture = {"image_size": 32, "patch_size": 8}
    return {
        "llama": Architecture(
            hf.LlamaForCausalLM, hf.LlamaConfig(**_SMALL, num_key_value_heads=2), _decoder
        ),
        "qwen3": Architecture(
            hf.Qwen3ForCausalLM,
            hf.Qwen3Config(**_SMALL, num_key_value_heads=2, head_dim=8),
            _decoder,
        ),
        "mistral": Architecture(
            hf.MistralForCausalLM, hf.MistralConfig(**_SMALL, num_key_value_heads=2), _decoder
        ),
        "gemma": Architecture(
            hf.GemmaForCausalLM,
            hf.GemmaConfig(**_SMALL, num_key_value_heads=2, head_dim=8),
            _decoder,
        ),
        "phi": Architecture(hf.PhiForCausalLM, hf.PhiConfig(**_SMALL), _decoder),
        "gpt2": Architecture(
            hf.GPT2LMHeadModel,
            hf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=VOCABULARY),
            _decoder,
        ),
        "opt": Architecture(
            hf.OPTForCausalLM,
            hf.OPTConfig(
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
                word_embed_proj_dim=32,
            ),
            _decoder,
        ),
        "bloom": Architecture(
            hf.BloomForCausalLM,
            hf.BloomConfig(hidden_size=32, n_layer=4, n_head=4, vocab_size=VOCABULARY),
            _decoder,
        ),
        "falcon": Architecture(
            hf.FalconForCausalLM,
            hf.FalconConfig(
                hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCABULARY
            ),
            _decoder,
        ),
        "mamba": Architecture(
            hf.MambaForCausalLM,
            hf.MambaConfig(
                hidden_size=32, num_hidden_layers=4, vocab_size=VOCABULARY, state_size=4
            ),
            _decoder,
        ),
        "mixtral": Architecture(
            hf.MixtralForCausalLM,
            hf.MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=4),
            _decoder,
        ),
        "t5": Architecture(
            hf.T5ForConditionalGeneration,
            hf.T5Config(
                d_model=32, d_ff=64, d_kv=8, num_layers=4, num_heads=4, vocab_size=VOCABULARY
            ),
            _text_to_text,
        ),
        "bart": Architecture(
            hf.BartForConditionalGeneration, hf.BartConfig(**_PAIR), _text_to_text
        ),
        "bert": Architecture(hf.BertModel, hf.BertConfig(**_SMALL), _text),
        "distilbert": Architecture(
            hf.DistilBertModel,
            hf.DistilBertConfig(
                dim=32, hidden_dim=64, n_layers=4, n_heads=4, vocab_size=VOCABULARY
            ),
            _text,
        ),
        "roberta": Architecture(hf.RobertaModel, hf.RobertaConfig(**_SMALL), _text),
        "deberta-v2": Architecture(hf.DebertaV2Model, hf.DebertaV2Config(**_SMALL), _text),
        "vit": Architecture(hf.ViTModel, hf.ViTConfig(**_LAYERS, **picture), _picture),
        "clip": Architecture(
            hf.CLIPModel,
            hf.CLIPConfig(
                text_config={**_SMALL, "eos_token_id": 2},
                vision_config={**_LAYERS, **picture},
            ),
            _picture_and_text,
        ),
        "whisper": Architecture(
            hf.WhisperForConditionalGeneration, hf.WhisperConfig(**whisper), _speech
        ),
    }


class Outcome(NamedTuple):
    """What became of one architecture."""

    name: str
    num_assemblies: int
    num_unique: int
    num_pieces: int
    num_compiled: int
    num_blocks: int
    reasons: tuple[str, ...]
    difference: float
    seconds: float
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether every call gave what eager gives."""
        return not self.error and self.difference <= TOLERANCE


def run(name: str, compiler: str, cache_dir: str) -> Outcome:
    """Run one architecture at every shape, eager and then by Precast."""
    started = time.perf_counter()
    architecture = architectures()[name]
    torch.manual_seed(0)
    model = architecture.model(architecture.config).eval()
    calls = [architecture.arguments(batch, length) for batch, length in SHAPES]
    difference, error = 0.0, ""
    with torch.no_grad():
        expected = [model(**call) for call in calls]
        precast.compile(model, compiler=compiler, cache_dir=cache_dir, revalidate="never")
        try:
            for call, theirs in zip(calls, expected, strict=True):
                difference = max(difference, largest_difference(model(**call), theirs))
        except Exception as problem:  # noqa: BLE001 - to be shown in the table, whatever it is.
            error = f"{type(problem).__name__}: {problem}"
    status = precast.status(model)
    precast.release(model)
    parts = [status, *status["blocks"]]
    assemblies = [assembly for part in parts for assembly in part["assemblies"]]
    slots = [slot for assembly in assemblies for slot in assembly["pieces"]]
    reasons = [reason for part in parts for reason in part["reasons"]]
    reasons += [slot["reason"] for slot in slots if slot["reason"]]
    return Outcome(
        name=name,
        num_assemblies=len(assemblies),
        num_unique=sum(assembly["unique_pieces"] for assembly in assemblies),
        num_pieces=len(slots),
        num_compiled=sum(slot["compiler"] != "eager" for slot in slots),
        num_blocks=sum(bool(block["assemblies"]) for block in status["blocks"]),
        reasons=tuple(dict.fromkeys(f"{r['code']}: {r['message']}" for r in reasons)),
        difference=difference,
        seconds=time.perf_counter() - started,
        error=error,
    )


def largest_difference(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference between two results of one structure.

    Raises:
        ValueError: They are of different types, keys, shapes or dtypes.
    """
    if type(ours) is not type(theirs):
        raise ValueError(f"a {type(ours).__name__} where eager gives a {type(theirs).__name__}")
    if isinstance(theirs, torch.Tensor):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(f"{ours.dtype}{[*ours.shape]}, not {theirs.dtype}{[*theirs.shape]}")
        if not theirs.numel():
            return 0.0
        return float((ours.to(torch.float64) - theirs.to(torch.float64)).abs().max())
    if isinstance(theirs, Mapping):
        if list(ours) != list(theirs):
            raise ValueError(f"keys {list(ours)}, not {list(theirs)}")
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, tuple | list):
        pairs = zip(ours, theirs, strict=True)
        return max((largest_difference(*pair) for pair in pairs), default=0.0)
    return 0.0


def describe(outcome: Outcome, compiler: str) -> str:
    """Say in one cell what runs compiled, or why not."""
    if outcome.error:
        return f"**failed**: {outcome.error}"
    said = []
    if compiler == "eager":
        if outcome.num_pieces:
            said.append("captured and cut")
    elif outcome.num_pieces:
        said.append(f"{outcome.num_compiled} of {outcome.num_pieces} compiled")
    if outcome.num_blocks:
        said.append(f"in {outcome.num_blocks} blocks")
    # Long messages name many parts; the first sentence tells which kind of thing it is.
    said += [reason if len(reason) < 160 else f"{reason[:157]}…" for reason in outcome.reasons]
    return "; ".join(said).replace("|", "\\|").replace("\n", " ")


def table(outcomes: list[Outcome], compiler: str) -> str:
    """Return the page."""
    shapes = ", ".join(f"({batch}, {length})" for batch, length in SHAPES)
    option = f" --compiler {compiler}" if compiler != "auto" else ""
    what = (
        'With `compiler="eager"`: captured, cut, written as text, read back, stitched and run, '
        "but not compiled."
        if compiler == "eager"
        else "Really compiled."
    )
    lines = [
        "# Architectures",
        "",
        f"Generated by `python benchmarks/architectures.py{option}`; do not edit.",
        "",
        f"Models of transformers {hf.__version__} with tiny random configurations of four layers, "
        "in float32, each called with batch",
        f"and length {shapes}. {what}",
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}.",
        "",
        "*Assemblies*: kinds of call that got code of their own; sizes of 1 often do. *Pieces*: "
        "different ones of all, over all assemblies.",
        "*Difference*: the largest absolute one from eager over all outputs and calls.",
        "",
        "| architecture | assemblies | pieces | outcome | difference |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {outcome.name} | {outcome.num_assemblies} | "
        f"{outcome.num_unique} of {outcome.num_pieces} | {describe(outcome, compiler)} | "
        f"{outcome.difference:.0e} |"
        for outcome in outcomes
    ]
    num_right = sum(outcome.is_right for outcome in outcomes)
    lines += ["", f"{num_right} of {len(outcomes)} come out equal to eager within {TOLERANCE:.0e}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="Precast on transformers' architectures.")
    parser.add_argument("--compiler", default="auto", help="as precast.compile takes it")
    parser.add_argument("--only", nargs="+", choices=sorted(architectures()), metavar="NAME")
    parser.add_argument("--cache-dir", help="keep artifacts there; a new empty folder if left out")
    parser.add_argument("--output", type=Path, help="write the page there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # transformers' own.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="precast-architectures-") as scratch:
        for name in options.only or architectures():
            outcome = run(name, options.compiler, options.cache_dir or scratch)
            outcomes.append(outcome)
            mark = "ok  " if outcome.is_right else "FAIL"
            print(
                f"{mark} {name:<12}{outcome.seconds:6.1f} s  difference {outcome.difference:.0e}  "
                f"{outcome.num_unique} of {outcome.num_pieces} pieces in "
                f"{outcome.num_assemblies} assemblies  {describe(outcome, options.compiler)}",
                flush=True,
            )
    output = options.output or (None if options.only else TABLE)
    if output is not None:
        output.write_text(table(outcomes, options.compiler))
        print(f"wrote {output}")
    return 0 if all(outcome.is_right for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
