"""The package as a whole: every name is there and says what it does, and it stays small enough to be read in an evening."""
import ast
import io
import tokenize
from pathlib import Path

import flowkit

FILES = sorted(Path(flowkit.__file__).parent.glob("*.py"))


def test_every_name_is_where_the_table_says():
    for name in flowkit.__all__:
        assert getattr(flowkit, name) is not None
    assert set(flowkit.__all__) <= set(dir(flowkit))
    modules = {path.stem for path in FILES} - {"__init__"} | {"widgets"}
    assert modules == set(flowkit._NAMES)


def public(tree):
    """The public classes and functions of a module, and the public methods that are neither forward nor inverse."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                inherited = {"forward", "inverse", "inverse_and_ldj", "exact", "split", "log_prob", "sample", "passes", "state_dict"}
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and part.name not in inherited:
                    yield part


def test_everything_public_says_what_it_does():
    bare = [f"{path.name}: {node.name}" for path in FILES for node in public(ast.parse(path.read_text())) if not ast.get_docstring(node)]
    assert bare == []
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in FILES)


def code_lines(source):
    """Lines that hold code: not blank, not a comment, not a docstring."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in layout
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_it_can_be_read_in_an_evening():
    assert sum(code_lines(path.read_text()) for path in FILES) < 2500
