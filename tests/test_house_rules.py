"""Rules of the house that no linter knows."""

import ast
import pathlib
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(__file__).resolve().parent.parent / "src" / "secateur"
FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_file_keeps_the_rules(path):
    """No assert, no swallowed exceptions, no global randomness outside streams, and readable sizes."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    code_lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code_lines) <= 400, f"{len(code_lines)} lines"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert at line {node.lineno}"
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception":
            assert not all(isinstance(entry, ast.Pass) for entry in node.body), f"swallowed at line {node.lineno}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert _body_lines(node, text) <= 40, f"{node.name}: {_body_lines(node, text)} lines"
    if path.name != "streams.py":
        assert "torch.manual_seed" not in text and "np.random." not in text


def _body_lines(node, text):
    """Code lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return 0
    lines = text.splitlines()[body[0].lineno - 1 : node.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


@pytest.mark.parametrize("words", [["-c", "import secateur"], ["-m", "secateur.cli.main", "--help"],
                                   ["-m", "secateur.cli.main", "methods"],
                                   ["-m", "secateur.cli.main", "prune", "--help"]])  # fmt: skip
def test_torch_is_not_imported_before_it_is_needed(words):
    """Importing the package, asking for help and listing methods must answer at once."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True, timeout=60
    )

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "secateur" in imported or "secateur.cli.main" in imported
    assert "torch" not in imported


def test_every_public_name_can_be_imported():
    """``secateur.__all__`` is true."""
    import secateur

    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
