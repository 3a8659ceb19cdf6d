"""Arrows point one way, and what must not be in the project is not."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT

FOLDERS = {
    "service": ROOT / "service",
    "training": ROOT / "training",
    "export": ROOT / "export",
    "load_tests": ROOT / "load_tests",
    "quintet_client": ROOT / "clients" / "python" / "src" / "quintet_client",
    "tests": ROOT / "tests",
}

OUR_IMPORTS = {
    "service": {"service"},
    "training": {"training", "service"},
    "export": {"export", "training", "service"},
    # The load tests are a caller like any other; they may compare with a room's own labour.
    "load_tests": {"load_tests", "service", "quintet_client"},
    "quintet_client": {"quintet_client"},
    "tests": set(FOLDERS),
}
"""Which of our packages each of them may import."""

FOREIGN = {
    "service": {
        "torch",
        "torchvision",
        "safetensors",
        "onnx",
        "onnxscript",
        "sklearn",
        "matplotlib",
        "pooch",
        "grpc",
    },
    "quintet_client": {"torch", "bentoml", "onnxruntime", "cv2", "pydantic", "structlog"},
}
"""What must not even be installed where they run."""

HELD_BY_A_DATA_PLANE = {
    "service.app",
    "service.rest",
    "service.grpc_api",
    "service.grpc_calls",
    "service.grpc_forms",
    "service.grpc_standard",
    "service.data_plane",
    "service.http",
    "service.http1",
    "service.http2",
}
"""Serving itself, which nobody but the service has a use for."""

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
"""Each runs what a file says."""

NOT_OURS = {"__pycache__", "build", "dist", "runs", "node_modules"}


def sources(package: str) -> list[Path]:
    return [path for path in sorted(FOLDERS[package].rglob("*.py")) if not NOT_OURS & set(path.parts)]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path, package: str) -> Iterator[str]:
    """Every module that a file imports, wherever in it; relative ones by their package."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}" if node.level else node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


@pytest.mark.parametrize("package", FOLDERS)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    files = sources(package)
    assert len(files) >= 4
    forbidden = (set(FOLDERS) - OUR_IMPORTS[package]) | FOREIGN.get(package, set())
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imported(path, package)
        if module.partition(".")[0] in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["training", "export"])
def test_what_serves_is_the_services_own_business(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(package)
        for module in imported(path, package)
        if any(module == inner or module.startswith(f"{inner}.") for inner in HELD_BY_A_DATA_PLANE)
    ]
    assert wrong == []


def test_the_batcher_and_the_rooms_know_no_protocol() -> None:
    protocols = {
        "grpc",
        "hpack",
        "httptools",
        "uvicorn",
        "starlette",
        "bentoml",
        "python_multipart",
        "service.http",
        "service.http1",
        "service.http2",
    }
    names = ("batcher", "lanes", "loaded_model", "catalogue", "data_plane", "runtime", "repository")
    rooms = (ROOT / "service" / "models").glob("*.py")
    core = [*(f"{name}.py" for name in names), *(f"models/{path.name}" for path in rooms)]
    for name in core:
        assert protocols.isdisjoint(imported(ROOT / "service" / name, "service")), name


@pytest.mark.parametrize("module", ["service.app", "service.models"])
def test_what_is_deployed_loads_nothing_of_training(module: str) -> None:
    forbidden = (FOREIGN["service"] | set(FOLDERS)) - {"service"}
    code = f"import sys, {module}; print(sorted({forbidden!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_the_client_loads_nothing_of_the_service() -> None:
    forbidden = (FOREIGN["quintet_client"] | set(FOLDERS)) - {"quintet_client"}
    code = f"import sys, quintet_client; print(sorted({forbidden!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


@pytest.mark.parametrize("package", FOLDERS)
def test_no_file_that_is_read_can_run_code(package: str) -> None:
    for path in sources(package):
        assert UNSAFE_MODULES.isdisjoint(imported(path, package)), path
        for node in ast.walk(parsed(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called = ast.unparse(node.func)
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                assert said.get("weights_only") == "True", f"{path}:{node.lineno}"
            if called in ("np.load", "numpy.load"):
                assert said.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        is_ours = not (NOT_OURS & set(parts) or any(part.endswith(".egg-info") for part in parts))
        is_hidden = parts[0].startswith(".") and parts[0] not in (".ci", ".github")
        if path.is_file() and is_ours and not is_hidden:
            content = path.read_bytes()
            if b"\0" not in content:
                yield path, content.decode(errors="replace")


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    # BentoML's images have their own user; that home is nobody's.
    machine = re.compile(r"(?<![\w.}])/(?:home/(?!bentoml/)|Users/|root/|work/|mnt/)\w")
    seen = 0
    for path, text in texts():
        seen += 1
        found = machine.search(text)
        assert not found, f"{path.relative_to(ROOT)} names {found and found[0]}"
    assert seen > 50
