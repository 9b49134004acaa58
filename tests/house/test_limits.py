"""Sizes and habits that a linter does not know, over everything written by hand."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FUNCTION_LINES_MAX = 70
LINE_COLUMNS_MAX = 100
FILE_LINES_MAX = 700
"""Hard; about 400 is the aim."""

BANNED_CALLS = {
    "time.sleep": "wait for a condition, or let the caller's clock decide",
    "pickle.load": "no pickle: a message must not be a program",
    "pickle.loads": "no pickle: a message must not be a program",
    "pickle.dumps": "no pickle: a message must not be a program",
    "eval": "no code from data",
    "exec": "no code from data",
    "os.system": "subprocess with a list of arguments",
    "pytest.skip": "a test runs or goes",
    "pytest.xfail": "a test passes or goes",
}
BANNED_NAMES = {"NotImplementedError": "nothing is half there"}
LEFTOVERS = re.compile(
    r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b"
)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Functions over the limit, docstrings not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_docstring = ast.get_docstring(node) is not None
            documented = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
            size = (node.end_lineno or 0) - node.lineno + 1 - documented
            if size > FUNCTION_LINES_MAX:
                yield f"{node.lineno}: {node.name} has {size} lines"


def banned(tree: ast.Module) -> Iterator[str]:
    """Calls and names that have no place here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in BANNED_CALLS:
            name = _dotted(node.func)
            yield f"{node.lineno}: {name}: {BANNED_CALLS[name]}"
        elif isinstance(node, ast.Name) and node.id in BANNED_NAMES:
            yield f"{node.lineno}: {node.id}: {BANNED_NAMES[node.id]}"


def asserts(tree: ast.Module) -> Iterator[str]:
    """Asserts outside methods named ``check``: input is validated with typed errors."""
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith("check"):
            inside.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node not in inside:
            yield f"{node.lineno}: assert"


def _report(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def test_functions_fit_a_screen(product, root: Path):
    _report(
        [f"{p.relative_to(root)}:{x}" for p, tree in product.items() for x in long_functions(tree)]
    )


def test_files_can_be_read_in_one_sitting(product, root: Path):
    sizes = {path: len(path.read_text().splitlines()) for path in product}
    _report([f"{p.relative_to(root)}: {n} lines" for p, n in sizes.items() if n > FILE_LINES_MAX])


def test_lines_fit(handwritten, root: Path):
    pragma = re.compile(r"  # (type: ignore|noqa)\b.*$")
    _report(
        [
            f"{path.relative_to(root)}:{number}: {len(line)} columns"
            for path in handwritten
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(pragma.sub("", line)) > LINE_COLUMNS_MAX
        ]
    )


def test_nothing_sleeps_unpickles_or_evaluates(handwritten, root: Path):
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in handwritten}
    _report([f"{p.relative_to(root)}:{x}" for p, tree in trees.items() for x in banned(tree)])


def test_product_code_validates_with_errors_not_asserts(product, root: Path):
    _report([f"{p.relative_to(root)}:{x}" for p, tree in product.items() for x in asserts(tree)])


def test_nothing_is_left_over(handwritten, root: Path):
    _report(
        [
            f"{path.relative_to(root)}:{number}: {line.strip()}"
            for path in handwritten
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if LEFTOVERS.search(line)
        ]
    )


def test_every_module_states_its_theory(product, root: Path):
    _report(
        [str(p.relative_to(root)) for p, tree in product.items() if not ast.get_docstring(tree)]
    )


def test_test_folders_are_not_packages(root: Path):
    _report([str(path) for path in (root / "tests").rglob("__init__.py")])


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("import time\ntime." + "sleep(1)\n", "time." + "sleep"),
        ("raise Not" + "ImplementedError\n", "Not" + "ImplementedError"),
        ("import pickle\npickle." + "loads(b'')\n", "pickle." + "loads"),
    ],
)
def test_a_banned_habit_is_found(source: str, finding: str):
    assert any(finding in x for x in banned(ast.parse(source)))


def test_a_long_function_is_found_and_a_long_docstring_forgiven():
    body = "    x = 1\n" * FUNCTION_LINES_MAX
    assert list(long_functions(ast.parse(f"def f():\n{body}")))
    docstring = '    """' + "line\n" * FUNCTION_LINES_MAX + '    """\n'
    assert not list(long_functions(ast.parse(f"def f():\n{docstring}    return 1\n")))


def test_an_assert_is_found_unless_it_is_an_invariant_check():
    assert list(asserts(ast.parse("def f(x):\n    assert x\n")))
    assert not list(asserts(ast.parse("def check(x):\n    assert x\n")))
