"""Imports point one way along the rooms of the library."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sdesens"
# room: the rooms it may import from, besides itself
MAY_IMPORT = {
    "errors": set(),
    "modules": {"errors"},
    "tensors": {"errors"},
    "noise": {"errors", "tensors"},
    "sde": {"errors", "tensors", "modules"},
    "rewrite": {"errors", "tensors", "sde"},
    "problem": {"errors", "tensors", "sde"},
    "functionals": {"errors", "tensors", "sde"},
    "integrate": {"errors", "tensors", "noise", "sde", "rewrite", "problem"},
    "sensitivity": {"errors", "tensors", "noise", "sde", "rewrite", "problem", "integrate"},
    "estimate": {"errors", "tensors"},
    "models": {"errors", "tensors", "sde", "rewrite", "problem", "functionals"},
}
for alone in ("memory", "tables", "jumps", "zoom", "tails"):  # these know nothing of SDEs
    MAY_IMPORT[alone] = set()
MAY_IMPORT["closer"] = {"problem", "zoom"}
MAY_IMPORT["audit"] = MAY_IMPORT["sensitivity"] | {"sensitivity", "zoom", "closer"}
MAY_IMPORT["applicable"] = MAY_IMPORT["audit"] | {"audit"}
MAY_IMPORT["auto"] = MAY_IMPORT["applicable"] | {"applicable"}
MAY_IMPORT["blocks"] = MAY_IMPORT["sensitivity"] | {"sensitivity", "estimate", "tails"}
MAY_IMPORT["estimators"] = MAY_IMPORT["blocks"] | {"jumps", "tables"}
MAY_IMPORT["montecarlo"] = MAY_IMPORT["blocks"] | MAY_IMPORT["auto"] | {"blocks", "auto"}
MAY_IMPORT["hessian"] = MAY_IMPORT["montecarlo"] | {"montecarlo"}
MAY_IMPORT["refinement"] = MAY_IMPORT["montecarlo"]
MAY_IMPORT["verdict"] = MAY_IMPORT["montecarlo"] | {"montecarlo", "refinement"}
MAY_IMPORT["crosscheck"] = MAY_IMPORT["verdict"] | {"verdict", "memory", "tables"}
MAY_IMPORT["diffusion"] = MAY_IMPORT["hessian"] | {"modules"}
MAY_IMPORT["training"] = MAY_IMPORT["diffusion"] | {"diffusion"}
MAY_IMPORT["roughness"] = {"errors", "estimate", "tensors", "tables"}
MAY_IMPORT["family"] = {"errors", "noise", "integrate", "problem"}
MAY_IMPORT["transitions"] = {"errors", "tensors", "noise", "sde", "integrate"}
MAY_IMPORT["fit"] = {"errors", "sde", "transitions"}
MAY_IMPORT["examples"] = MAY_IMPORT["crosscheck"] | {"estimators", "fit", "models"}
MAY_IMPORT["plot"] = (
    MAY_IMPORT["crosscheck"]
    | MAY_IMPORT["diffusion"]
    | {"diffusion", "estimators", "crosscheck", "roughness", "family", "fit"}
)
MAY_IMPORT["cli"] = MAY_IMPORT["plot"] | MAY_IMPORT["training"] | {"crosscheck", "plot", "models", "training"}
MAY_IMPORT["__main__"] = {"cli"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("sdesens.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    if path == PACKAGE / "__init__.py":
        assert not imported_rooms(path) & {"plot", "cli", "models", "examples", "training"}
        return
    assert imported_rooms(path) - {room(path)} <= MAY_IMPORT[room(path)]
