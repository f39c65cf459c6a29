"""The passes that come with Precast, and what a key says of each.

This module imports nothing: a warm start reads the versions and no pass.
"""

#: Name to version. A step of it makes what was compiled with an older one a miss.
VERSIONS: dict[str, str] = {
    "canonical_norm": "1",
    "canonical_residual": "1",
    "activation_and_multiply": "1",
    "merge_linears": "1",
    "merge_linears_on_gpu": "1",
    "no_ops": "1",
    "clean_up": "1",
    "in_place": "1",
}

#: Those that a measurement showed to be worth it: none so far; docs/passes.md has the figures.
DEFAULT: tuple[str, ...] = ()

#: They have weights become views of one tensor.
PACKING = frozenset({"merge_linears", "merge_linears_on_gpu"})

#: They change the whole graph, before it is cut: what they do shows in the pieces' texts, so that
#: pieces' keys do not name them.
ON_WHOLE_GRAPH = frozenset(
    {
        "canonical_norm",
        "canonical_residual",
        "activation_and_multiply",
        *PACKING,
    }
)
