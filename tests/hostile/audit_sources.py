"""What the Python code that fx generates of a graph may say."""

import ast
import re

_STATEMENTS = (ast.Assign, ast.Return, ast.Expr)
_EXPRESSIONS = (
    *(ast.Name, ast.Constant, ast.Attribute, ast.Subscript, ast.Slice, ast.List, ast.Tuple, ast.Call, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context),
)
_FUNCTIONS = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed)\.\w+\.\w+|torch\.(sym_(max|min|float|int|not)|device)|device"
    r"|_?operator\.\w+|math_?\.?(ceil|floor|trunc)|_operator_\w+"
)


def strange_code(source: str) -> str:
    """Return the first thing in generated code that no graph of operations on tensors needs; empty if there is none."""
    try:
        module = ast.parse(source)
    except SyntaxError as error:
        return f"syntax error: {error}"
    if len(module.body) != 1 or not isinstance(module.body[0], ast.FunctionDef):
        return f"{len(module.body)} statements instead of one function"
    function = module.body[0]
    if function.name != "forward" or function.decorator_list or function.args.defaults or function.args.kw_defaults:
        return f"the function {function.name}, decorators or defaults"
    for statement in function.body:
        if not isinstance(statement, _STATEMENTS):
            return ast.unparse(statement)
        for node in ast.iter_child_nodes(statement):
            if (found := _strange(node)) is not None:
                return ast.unparse(found)
    return ""


def _strange(expression: ast.AST) -> ast.AST | None:
    for node in ast.walk(expression):
        if not isinstance(node, _EXPRESSIONS):
            return node
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            return node
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            return node
        if isinstance(node, ast.Call) and not _FUNCTIONS.fullmatch(ast.unparse(node.func)) and not _reads(node):
            return node
    return None


def _reads(call: ast.Call) -> bool:
    """Whether it is ``getattr(self, "0")``: a child whose name is a number."""
    if not isinstance(call.func, ast.Name) or call.func.id != "getattr" or call.keywords or len(call.args) != 2:
        return False
    owner, name = call.args
    roots = [node.id for node in ast.walk(owner) if isinstance(node, ast.Name) and node.id != "getattr"]
    constant = isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith("__")
    return constant and roots == ["self"]
