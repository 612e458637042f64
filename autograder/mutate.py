"""Wrong programs made from a right one: each changes its syntax tree in one place, as a slip of the pen would.

A mutant carries its own truth: the kinds of fault that its change may rightly be called, and the places where it lies,
in the closed vocabulary of autograder.exercise. So a diagnosis can be held against it (autograder.audit); and the mutants of
another right answer, written differently, are slips that a diagnosis can recognise (autograder.judge).
"""
import ast
import copy
import itertools
from dataclasses import dataclass

FUNCTIONS = {"exp", "log", "tanh", "sigmoid", "softmax", "logsigmoid", "abs", "sqrt", "log_softmax", "softplus"}
OPPOSITE = {"exp": "log", "sigmoid": "tanh", "logsigmoid": "tanh"}
REDUCTIONS = {"sum", "mean", "std", "logsumexp", "var"}
ALONG = {"chunk", "split", "cat", "softmax", "stack", "log_softmax", "flip", *REDUCTIONS}     # what takes a dimension
SIZES = {"split", "reshape", "view", "expand", "repeat", "zeros", "ones", "full", "unflatten", "narrow", "new_zeros", "new_ones", "randn", "eye", "Linear"}
NUMBERS = {"tril", "triu", "range", "chunk"}     # what takes a whole number that is no dimension


@dataclass(frozen=True)
class Edit:
    """Replace the node with that number (in the order of ast.walk) by `new`; None deletes a statement."""
    node: int
    new: ast.AST | None
    kinds: tuple        # the best name first
    places: frozenset
    what: str
    method: str

    @property
    def place(self):
        """The best name for where it lies."""
        return next(p for p in (self.method, "ldj", "loss", "value", "parameters", "net", "gradient") if p in self.places)


@dataclass(frozen=True)
class Mutant:
    """A wrong program: `edits` are its faults, one or two."""
    code: str
    edits: tuple

    @property
    def name(self):
        return " and ".join(e.what for e in self.edits)


def mutants(code, pairs=0, rng=None):
    """All programs with one fault, and `pairs` with two, drawn by `rng` (a random.Random); each compiles and differs from the others."""
    tree = ast.parse(code)
    edits = list(_edits(tree))
    found, unchanged = {}, ast.unparse(tree)
    for edit in edits:
        text = _apply(tree, edit)
        if text is not None and text != unchanged:
            found.setdefault(text, (edit,))
    singles = list(found.values())
    nodes = list(ast.walk(tree))
    inside = {e.node: {id(n) for n in ast.walk(nodes[e.node])} for e in edits}
    candidates = [(a, b) for (a,), (b,) in itertools.combinations(singles, 2)
                  if id(nodes[a.node]) not in inside[b.node] and id(nodes[b.node]) not in inside[a.node]]
    for a, b in (rng.sample(candidates, min(pairs, len(candidates))) if pairs else ()):
        text = _apply(tree, a, b)
        if text is not None:
            found.setdefault(text, (a, b))
    return [Mutant(text, edits) for text, edits in found.items()]


def edited(code, *edits):
    """The program with several faults at once, or None if that is no program."""
    tree = ast.parse(code)
    nodes = list(ast.walk(tree))
    inside = [{id(n) for n in ast.walk(nodes[e.node])} for e in edits]
    if any(id(nodes[a.node]) in b for i, a in enumerate(edits) for j, b in enumerate(inside) if i != j):
        return None     # one lies within the other
    return _apply(tree, *edits)


def _apply(tree, *edits):
    """The text of the tree after the edits, or None if that is no program; the tree stays as it is."""
    nodes = list(ast.walk(tree))
    by_id = {id(nodes[e.node]): e.new for e in edits}
    undo = []
    for parent in nodes:
        for name, value in ast.iter_fields(parent):
            if isinstance(value, list) and any(id(v) in by_id for v in value):
                kept = [by_id.get(id(v), v) for v in value]
                undo.append((parent, name, value))
                setattr(parent, name, [v for v in kept if v is not None])
            elif id(value) in by_id:
                undo.append((parent, name, value))
                setattr(parent, name, by_id[id(value)])
    try:
        text = ast.unparse(tree)
        compile(text, "<mutant>", "exec")
    except (SyntaxError, ValueError):
        return None     # an edit may empty a block
    finally:
        for parent, name, value in undo:
            setattr(parent, name, value)
    return text


def _edits(tree):
    numbers = {id(n): i for i, n in enumerate(ast.walk(tree))}
    parents = {id(c): n for n in ast.walk(tree) for c in ast.iter_child_nodes(n)}
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        places = _Places(function, parents)
        for node in ast.walk(function):
            if node is function or _skipped(node, parents, function):
                continue
            size = any(isinstance(n, ast.Call) and _name(n) in SIZES and not (isinstance(n.func, ast.Attribute) and _inside(node, n.func, parents))
                       for n in _above(node, parents))
            for new, kinds, words in _changes(node, parents):
                kinds = (*kinds, "shape") if size and "shape" not in kinds else kinds      # a size may rightly be called that
                where = places.of(node) | (frozenset({"gradient"}) if "detached" in kinds else frozenset())
                before, after = ast.unparse(node), "nothing" if new is None else ast.unparse(new)
                yield Edit(numbers[id(node)], new, kinds, where, f"{function.name}: {words}, {before} -> {after}", function.name)
    for cls in [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]:
        yield from _directions(cls, numbers)


def _skipped(node, parents, function):
    """Docstrings, names of arguments, the stub's last line, super().__init__(), and what belongs to a function inside."""
    while node is not function:
        if isinstance(node, (ast.arguments, ast.Raise, ast.FunctionDef)):
            return True
        if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or ast.unparse(node).startswith("super()")):
            return True
        node = parents[id(node)]
    return False


class _Places:
    """Where a node of a function lies: what it feeds decides (ldj, or the value), and the method it stands in."""

    def __init__(self, function, parents):
        self.function, self.parents = function, parents
        method = isinstance(parents[id(function)], ast.ClassDef)
        returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value is not None]
        tuples = [v for v in returned if isinstance(v, ast.Tuple) and len(v.elts) == 2]
        first = {n.id for v in returned for n in ast.walk(v.elts[0] if v in tuples else v) if isinstance(n, ast.Name)}
        self.ldj_nodes = {id(n) for v in tuples for n in ast.walk(v.elts[1])} if function.name != "factors" else set()
        second = {n.id for v in tuples for n in ast.walk(v.elts[1]) if isinstance(n, ast.Name)}
        assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign)]
        for _ in assigned:      # what a name is computed from feeds what the name feeds
            for a in assigned:
                targets = {n.id for t in a.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
                names = {n.id for n in ast.walk(a.value) if isinstance(n, ast.Name)}
                first |= names if targets & first else set()
                second |= names if targets & second else set()
        self.first, self.second = first, second
        base = {"forward": {"forward"}, "inverse": {"inverse"}}.get(function.name) if method else {"value"}
        if method and base is None:
            base = {"parameters", "state", "net", "input", "value"} | (set() if function.name == "__init__" else {"forward", "inverse"})
        if not method and function.name.startswith("train"):
            base = {"loss", "gradient", "parameters", "value"}
        if not method and function.name.startswith("make"):
            base = {"net", "value", "parameters"}
        self.base = base

    def of(self, node):
        if id(node) in self.ldj_nodes:
            return frozenset({"ldj"})
        statement, text = node, ""
        while not isinstance(statement, ast.stmt):
            statement = self.parents[id(statement)]
        text = ast.unparse(statement)
        places = set(self.base)
        if isinstance(statement, ast.Assign):
            targets = {n.id for t in statement.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            if targets & self.second and not targets & self.first:
                return frozenset({"ldj"})
            if targets & self.second:
                places |= {"ldj"}
        if "self.net" in text or "parameters_at" in text:
            places |= {"net"}
        if "self." in text and any(isinstance(n, (ast.If, ast.With)) for n in _above(statement, self.parents)):
            places |= {"state", "parameters"}
        return frozenset(places)


def _above(node, parents):
    while id(node) in parents:
        node = parents[id(node)]
        yield node


def _inside(node, outer, parents):
    return node is outer or any(n is outer for n in _above(node, parents))


def _name(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _call(value, method):
    return ast.Call(ast.Attribute(value, method, ast.Load()), [], [])


def _subject(call):
    """What a function is applied to: x of x.exp() and of torch.exp(x)."""
    inner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if isinstance(inner, ast.Name) and inner.id in ("torch", "F", "nn", "math"):
        return call.args[0] if call.args else None
    return inner if inner is not None else (call.args[0] if call.args else None)


def _changes(node, parents):
    """(replacement, kinds, words) of every slip at this node."""
    if isinstance(node, ast.BinOp):
        yield from _binary(node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield node.operand, ("sign",), "a sign dropped"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand, ("state", "sign"), "a condition turned round"
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Gt, ast.Lt)):
        turned = ast.Lt() if isinstance(node.ops[0], ast.Gt) else ast.Gt()
        yield ast.Compare(node.left, [turned], node.comparators), ("sign", "exchanged", "direction"), "a comparison turned round"
    elif isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) > 1:
        words = "two exchanged" if isinstance(node.ctx, ast.Store) else "two in the wrong order"
        index = isinstance(parents[id(node)], ast.Subscript)
        yield type(node)([node.elts[1], node.elts[0], *node.elts[2:]], node.ctx), ("wrong axis", "order") if index else ("exchanged", "order"), words
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
        yield ast.Subscript(node.value, ast.Constant(1 - node.slice.value), node.ctx), ("exchanged", "off by one"), "the other entry"
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(node.value / 100), ("constant",), "another constant"
    elif isinstance(node, (ast.Assign, ast.Expr, ast.AugAssign)) and isinstance(parents[id(node)], (ast.For, ast.With, ast.If)):
        if isinstance(node, ast.Expr):
            yield None, ("missing term", "missing function", "state", "order"), "a step left out"


def _binary(node):
    left, right, op = node.left, node.right, node.op
    if isinstance(op, (ast.Add, ast.Sub)):
        yield ast.BinOp(left, ast.Sub() if isinstance(op, ast.Add) else ast.Add(), right), ("sign",), "a sign turned"
        yield left, ("missing term", "missing function"), "a term dropped"
        yield (right if isinstance(op, ast.Add) else ast.UnaryOp(ast.USub(), right)), ("missing term", "missing function"), "a term dropped"
        if isinstance(op, ast.Sub):
            yield ast.BinOp(right, op, left), ("sign", "exchanged"), "a difference turned round"
    elif isinstance(op, (ast.Mult, ast.Div)):
        turned = ast.Div() if isinstance(op, ast.Mult) else ast.Mult()
        yield ast.BinOp(left, turned, right), ("sign", "wrong function", "direction"), "a product turned into a quotient, or back"
        if isinstance(op, ast.Mult):
            yield ast.BinOp(left, ast.Add(), right), ("wrong function",), "a sum for a product"
        yield left, ("missing term", "missing function"), "a factor dropped"
        if isinstance(op, ast.Mult) and not isinstance(left, (ast.List, ast.Name)):
            yield right, ("missing term", "missing function"), "a factor dropped"
    elif isinstance(op, ast.MatMult):
        yield ast.BinOp(right, op, left), ("exchanged", "order"), "two matrices exchanged"
        yield left, ("missing term", "missing function"), "a matrix dropped"


def _calls(node):
    name, subject = _name(node), _subject(node)
    if name in FUNCTIONS and subject is not None:
        yield subject, ("missing function",), f"{name} dropped"
        if name in OPPOSITE:
            yield _call(subject, OPPOSITE[name]), ("wrong function",), f"{OPPOSITE[name]} for {name}"
    if name in REDUCTIONS and subject is not None and name != "logsumexp":
        yield subject, ("shape", "missing function", "reduction"), f"{name} dropped"
        yield _call(subject, name), ("reduction", "wrong axis", "shape"), f"{name} over everything"
        other = "mean" if name != "mean" else "sum"
        kinds = ("reduction",) if name in ("sum", "mean") else ("wrong function", "reduction")
        yield ast.Call(ast.Attribute(subject, other, ast.Load()), _dims(node, subject), node.keywords), kinds, f"{other} for {name}"
        if name == "sum" and (_dims(node, subject) or node.keywords):
            kept = [*node.keywords, ast.keyword("keepdim", ast.Constant(True))]
            yield ast.Call(node.func, node.args, kept), ("shape",), "a dimension kept"
    if name in ALONG:
        for keyword in node.keywords:
            if keyword.arg == "dim":
                other = ast.keyword("dim", ast.Constant(-1 if ast.unparse(keyword.value) == "0" else 0))
                yield (ast.Call(node.func, node.args, [other if k is keyword else k for k in node.keywords]),
                       ("wrong axis", "reduction", "shape"), "along the wrong dimension")
        if node.args and _whole(node.args[-1]) and name not in ("chunk",) and not (len(node.args) == 1 and subject is node.args[0]):
            other = 0 if ast.unparse(node.args[-1]) != "0" else -1
            yield (ast.Call(node.func, [*node.args[:-1], ast.Constant(other)], node.keywords),
                   ("wrong axis", "reduction", "shape"), "along the wrong dimension")
    if name in NUMBERS and node.args and _whole(node.args[0]):
        n = ast.literal_eval(node.args[0])
        for step in (1, -1):
            yield ast.Call(node.func, [ast.Constant(n + step), *node.args[1:]], node.keywords), ("off by one",), "off by one"
    if len(node.args) >= 2 and name not in ("chunk", "split", "cat", *REDUCTIONS, "zeros", "randn", "register_buffer", "reshape"):
        kinds = ("order", "exchanged", "extra term") if name == "Sequential" else ("exchanged", "order", "sign")
        yield ast.Call(node.func, [*node.args[:-2], node.args[-1], node.args[-2]], node.keywords), kinds, "two arguments exchanged"
    if isinstance(node.func, ast.Attribute) and name in ("net", "log_prob"):
        yield _call(node, "detach"), ("detached",), "cut off from the graph"
    if name == "argsort":
        yield subject, ("missing function", "direction"), "argsort dropped"


def _whole(node):
    try:
        return type(ast.literal_eval(node)) is int
    except ValueError:
        return False


def _dims(node, subject):
    """The positional arguments of a reduction that are not its subject."""
    return [a for a in node.args if a is not subject]


def _directions(cls, numbers):
    """inverse does what forward does, or nothing; forward does nothing."""
    methods = {n.name: n for n in cls.body if isinstance(n, ast.FunctionDef)}
    if not {"forward", "inverse"} <= methods.keys():
        return
    for name, text, kinds in (("inverse", "return self.forward({arg})[0]", ("direction", "sign")), ("inverse", "return {arg}", ("missing function", "missing term"))):
        method = methods[name]
        arg = method.args.args[1].arg
        new = copy.deepcopy(method)
        new.body = ast.parse(text.format(arg=arg)).body
        yield Edit(numbers[id(method)], new, kinds, frozenset({"inverse"}), f"{name}: {text.format(arg=arg)}", name)
