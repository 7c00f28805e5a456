# SPDX-License-Identifier: Apache-2.0
"""Which files read a settings key, found in the syntax trees of the package without running them.

An access ``x.rollout_cap`` counts for ``CreditConfig.rollout_cap`` if ``x`` is known to be a ``CreditConfig``: by an
annotation, an assignment, the attribute of a known dataclass, or because it is called ``opd``. A value that is handed
on, to a field of another dataclass or through a property, is read where that is read. Checks do not count as readers:
a setting that is only validated does nothing.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from opd_ext.reference.fields import PACKAGE, source_file

# An instance of a class, or a list or mapping of such: ("one" | "many", key of the class, "file:name").
Kind = tuple[str, str]

_NAMED = {"opd": "OPDConfig"}
"""What an attribute or variable of this name is, where nothing else says it."""

_PLAIN = {"train": "TrainConfig"}
"""Names under which a settings dataclass travels as a plain mapping, to processes that read it from JSON."""

_CHECKS = ("config/checks.py", "config/verl_keys.py", "plan/page.py")
_CHECKING = re.compile(r"_?check|_?try_|__str__|__post_init__")


@dataclass
class Class:
    """What is known of a class of the package; ``key`` is "file:name"."""

    key: str
    file: str
    bases: list[str]
    fields: dict[str, ast.expr] = field(default_factory=dict)  # annotated in the body, in order
    properties: dict[str, ast.FunctionDef] = field(default_factory=dict)
    attributes: dict[str, Kind] = field(default_factory=dict)  # assigned to self


class Package:
    """The syntax trees below ``root``, and the reads of fields in them: :meth:`readers`."""

    def __init__(self, root: Path = PACKAGE):
        self.root = root
        paths = sorted(root.rglob("*.py"))
        self.trees = {str(path.relative_to(root)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
        self.classes: dict[str, Class] = {}
        self.named: dict[str, list[str]] = defaultdict(list)  # name of a class -> keys
        self.returns: dict[str, tuple[str, ast.expr]] = {}  # function -> its file, what it returns
        self.constants: dict[str, list[str]] = {}  # of a module -> the texts in it
        self.imports: dict[str, dict[str, str]] = {}  # file -> name -> file that it is imported from
        for file, tree in self.trees.items():
            self._collect(file, tree)

    def _collect(self, file: str, tree: ast.Module) -> None:
        self.imports[file] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found = _class(node, file)
                self.classes[found.key] = found
                self.named[node.name].append(found.key)
            elif isinstance(node, ast.ImportFrom) and node.module:
                where = "/".join(node.module.split(".")[1:]) + ".py"
                self.imports[file] |= {alias.asname or alias.name: where for alias in node.names}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                self.returns[node.name] = file, node.returns
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = _texts(node.value)

    # ------------------------------------------------------------------ types

    def resolve(self, name: str, file: str) -> str | None:
        """Key of the class that ``name`` means in ``file``; of several by that name, the one that is imported."""
        keys = self.named.get(name, [])
        places = (file, self.imports[file].get(name))
        return keys[0] if len(keys) == 1 else next((key for key in keys if self.classes[key].file in places), None)

    def family(self, key: str | None) -> Iterator[Class]:
        """The class and its bases, nearest first."""
        if key is not None:
            yield self.classes[key]
            for base in self.classes[key].bases:
                yield from self.family(self.resolve(base, self.classes[key].file))

    def kind(self, annotation: ast.expr | None, file: str) -> Kind | None:
        """The class of the package that an annotation in ``file`` names."""
        if isinstance(annotation, ast.Constant) and str(annotation.value).isidentifier():
            annotation = ast.Name(annotation.value)  # other texts are shapes: Float[Tensor, "*tokens"]
        if isinstance(annotation, ast.BinOp):
            return self.kind(annotation.left, file) or self.kind(annotation.right, file)
        if isinstance(annotation, ast.Subscript):
            inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            found = next(filter(None, (self.kind(part, file) for part in inner)), None)
            return found and ("many", found[1])
        key = self.resolve(_name(annotation), file)
        return ("one", key) if key else None

    def member(self, owner: str, name: str) -> Kind | None:
        """What an attribute of an instance is."""
        for cls in self.family(owner):
            if name in cls.fields:
                return self.kind(cls.fields[name], cls.file)
            if name in cls.properties:
                return self.kind(cls.properties[name].returns, cls.file)
            if name in cls.attributes:
                return cls.attributes[name]
        return None

    def node(self, owner: str, name: str) -> tuple[str, str] | None:
        """(key of the class that defines it, name) of a field or property."""
        return next(((c.key, name) for c in self.family(owner) if name in c.fields or name in c.properties), None)

    def field_names(self, owner: str | None) -> list[str]:
        """The fields of a dataclass in the order of its constructor."""
        found: dict[str, None] = {}
        for cls in reversed(list(self.family(owner))):
            found |= dict.fromkeys(cls.fields)
        return list(found)

    # ------------------------------------------------------------------ reads

    @cached_property
    def _reads(self) -> _Reads:
        for _ in range(2):  # an attribute may be assigned from one that is found only in the first round
            reads = _Reads()
            for file, tree in self.trees.items():
                _Visitor(self, file, reads).visit(tree)
        return reads

    def readers(self, kind: type, name: str) -> list[str]:
        """Files, relative to the package, that use a field; its own class's file only if there is no other."""
        start = self.node(f"{source_file(kind)}:{kind.__name__}", name)
        found, seen, ahead = set(), set(), [start]
        while ahead:
            node = ahead.pop()
            if node not in seen:
                seen.add(node)
                found |= self._reads.files[node]
                ahead += self._reads.handed[node]
        return sorted(found - {self.classes[start[0]].file}) or sorted(found)

    def checkers(self, kind: type, name: str) -> list[str]:
        """Files that look at a field only to refuse or to print it."""
        return sorted(self._reads.checks[self.node(f"{source_file(kind)}:{kind.__name__}", name)])


@dataclass
class _Reads:
    """Node -> files that use it, files that check it, and nodes that it is handed on to."""

    files: dict = field(default_factory=lambda: defaultdict(set))
    checks: dict = field(default_factory=lambda: defaultdict(set))
    handed: dict = field(default_factory=lambda: defaultdict(set))


@cache
def package() -> Package:
    """This package, read once."""
    return Package()


def _name(node: ast.AST | None) -> str:
    """The last name of ``a.b.c``; empty for anything else."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _texts(node: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def _class(node: ast.ClassDef, file: str) -> Class:
    found = Class(f"{file}:{node.name}", file, [_name(base) for base in node.bases])
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "ClassVar" not in ast.unparse(statement.annotation):
                found.fields[statement.target.id] = statement.annotation
        elif isinstance(statement, ast.FunctionDef):
            decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in statement.decorator_list}
            if decorators & {"property", "cached_property"}:
                found.properties[statement.name] = statement
    return found


class _Visitor(ast.NodeVisitor):
    """Walks a file with the classes of the variables in view."""

    def __init__(self, package: Package, file: str, reads: _Reads):
        self.package, self.file, self.reads = package, file, reads
        self.scopes: list[dict[str, Kind]] = [{}]
        self.owner: str | None = None  # class whose body this is
        self.functions: list[ast.FunctionDef] = []
        self.receiver: tuple[str, str] | None = None  # node that the values read here are handed to

    # ------------------------------------------------------------------ scopes

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.owner = self.owner, f"{self.file}:{node.name}"
        self.generic_visit(node)
        self.owner = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope: dict[str, Kind] = {}
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            if (kind := self.package.kind(argument.annotation, self.file)) is not None:
                scope[argument.arg] = kind
        is_method = self.owner is not None and not self.functions
        if is_method and arguments and arguments[0].arg == "self":
            scope["self"] = ("one", self.owner)
        self.scopes.append(scope)
        self.functions.append(node)
        outer = self.receiver
        if is_method and node.name in self.package.classes[self.owner].properties:
            self.receiver = (self.owner, node.name)
        self.generic_visit(node)
        self.receiver = outer
        self.functions.pop()
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def bind(self, target: ast.expr, kind: Kind | None) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1].pop(target.id, None)
            if kind is not None:
                self.scopes[-1][target.id] = kind
        elif isinstance(target, ast.Attribute) and kind is not None and self.owner is not None:
            if isinstance(target.value, ast.Name) and target.value.id == "self":
                self.package.classes[self.owner].attributes[target.attr] = kind

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=False):
                    self.bind(part, self.kind_of(value))
            else:
                self.bind(target, self.kind_of(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if self.functions:
            self.bind(node.target, self.package.kind(node.annotation, self.file))

    def visit_For(self, node: ast.For) -> None:
        self.bind_loop(node.target, node.iter)
        self.generic_visit(node)

    def bind_loop(self, target: ast.expr, over: ast.expr) -> None:
        """Elements of a list, and values of a mapping, of a known class."""
        called = over.func.attr if isinstance(over, ast.Call) and isinstance(over.func, ast.Attribute) else None
        kind = self.kind_of(over.func.value if called in ("items", "values") else over)
        if kind is None or kind[0] != "many":
            return
        if called == "items" and isinstance(target, ast.Tuple):
            target = target.elts[-1]
        self.bind(target, ("one", kind[1]))

    def visit_comprehension_scope(self, node: ast.expr) -> None:
        self.scopes.append({})
        for generator in node.generators:
            self.bind_loop(generator.target, generator.iter)
        self.generic_visit(node)
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_scope

    # ------------------------------------------------------------------ expressions

    def kind_of(self, node: ast.expr) -> Kind | None:
        """What an expression is, if it is known."""
        if isinstance(node, ast.Name):
            found = next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
            return found or self.named(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.kind_of(node.value)
            found = self.package.member(owner[1], node.attr) if owner and owner[0] == "one" else None
            return found or self.named(node.attr)
        if isinstance(node, ast.Call):
            name = _name(node.func)
            if key := self.package.resolve(name, self.file):
                return ("one", key)
            if name == "replace" and node.args:
                return self.kind_of(node.args[0])
            file, returned = self.package.returns.get(name, (self.file, None))
            return self.package.kind(returned, file)
        if isinstance(node, ast.Subscript):
            kind = self.kind_of(node.value)
            return ("one", kind[1]) if kind and kind[0] == "many" else None
        if isinstance(node, ast.BoolOp):
            return next(filter(None, map(self.kind_of, node.values)), None)
        if isinstance(node, ast.IfExp):
            return self.kind_of(node.body) or self.kind_of(node.orelse)
        return None

    def named(self, name: str, table: dict[str, str] = _NAMED) -> Kind | None:
        keys = self.package.named.get(table.get(name, ""), [])
        return ("one", keys[0]) if keys else None

    def read(self, owner: Kind | None, names: Iterable[str]) -> None:
        """Record that the fields or properties of a known class are used here."""
        if owner is None or owner[0] != "one":
            return
        checks = self.file in _CHECKS or any(_CHECKING.match(function.name) for function in self.functions)
        for node in filter(None, (self.package.node(owner[1], name) for name in names)):
            (self.reads.checks if checks else self.reads.files)[node].add(self.file)
            if self.receiver is not None and self.receiver != node and not checks:
                self.reads.handed[node].add(self.receiver)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.read(self.kind_of(node.value), [node.attr])
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.slice, ast.Constant) and isinstance(node.ctx, ast.Load):
            self.read(self.named(_name(node.value), _PLAIN), [str(node.slice.value)])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node.func)
        if name == "getattr" and len(node.args) > 1 and self.functions:
            self.read(self.kind_of(node.args[0]), self.attribute_names(node.args[1]))
        elif name == "astuple" and node.args and (kind := self.kind_of(node.args[0])):
            self.read(kind, self.package.field_names(kind[1]))
        key = self.package.resolve(name, self.file)
        fields = self.package.field_names(key)
        self.visit(node.func)
        for place, argument in enumerate(node.args):
            self.hand_on(argument, (key, fields[place]) if place < len(fields) else None)
        for keyword in node.keywords:
            self.hand_on(keyword.value, (key, keyword.arg) if keyword.arg in fields else None)

    def hand_on(self, value: ast.expr, to: tuple[str, str] | None) -> None:
        """An argument of a call, and the field of a dataclass that it becomes."""
        outer = self.receiver
        if to is not None:
            self.receiver = self.package.node(*to)
        self.visit(value)
        self.receiver = outer

    def attribute_names(self, name: ast.expr) -> list[str]:
        """The names that ``getattr`` may be given: its constant, or all texts that the function mentions."""
        if isinstance(name, ast.Constant):
            return [str(name.value)]
        function = self.functions[-1]
        named = (self.package.constants.get(_name(node), []) for node in ast.walk(function))
        return [*_texts(function), *(text for texts in named for text in texts)]
