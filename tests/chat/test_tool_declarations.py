import pytest

from moonlit.chat.tool_declarations import declare_tools

CROP = {
    "name": "crop",
    "description": "Cut a part out of a picture.\n\nUse it to see small things.",
    "parameters": {
        "type": "object",
        "properties": {
            "zoom": {"type": "number", "minimum": 1, "maximum": 8, "default": 2},
            "box": {
                "type": "array",
                "description": "left, top, right, bottom",
                "items": {"type": "number", "description": "in [0, 1]"},
                "minItems": 4,
                "maxItems": 4,
            },
            "mode": {"enum": ["fast", "exact"]},
            "note": {"type": ["string", "null"]},
            "where": {"$ref": "#/$defs/Point"},
        },
        "required": ["box", "where"],
        "additionalProperties": False,
        "$defs": {
            "Point": {
                "type": "object",
                "description": "a place",
                "properties": {"y": {"type": "integer"}, "x": {"type": "integer"}},
                "required": ["x", "y"],
            }
        },
    },
}

DECLARED = """# Tools

## functions
namespace functions {
// a place
interface Point {
  x: number,
  y: number
}
// Cut a part out of a picture.

// Use it to see small things.
type crop = (_: {
  // left, top, right, bottom
  // maxItems: 4, minItems: 4
  box: Array<
    // in [0, 1]
    number
  >,
  where: Point,
  mode?: "fast" | "exact",
  note?: string | null,
  // maximum: 8, minimum: 1
  // Default: 2
  zoom?: number,
  [k: string]: never
}) => any;
type now = (_: {}) => any;
}
"""


def test_tools_are_declared_as_typescript_types():
    wrapped = {"type": "function", "function": CROP}

    assert declare_tools([wrapped, {"name": "now"}]) == DECLARED


def test_a_default_of_nought_is_declared_and_none_is_not():
    """Catches: defaults that are false, zero or empty left out with those that are not there."""
    properties = {
        "all": {"type": "boolean", "default": False},
        "from": {"type": "integer", "default": 0},
        "to": {"type": "integer", "default": None},
    }

    declared = declare_tools([{"name": "read", "parameters": {"properties": properties}}])

    fields = [
        "  // Default: false",
        "  all?: boolean,",
        "  // Default: 0",
        "  from?: number,",
        "  to?: number",
    ]
    assert "type read = (_: {\n" + "\n".join(fields) + "\n}) => any;" in declared


def test_an_object_inside_an_object_is_indented_once_more():
    """Catches: every object laid out as if it stood at the left margin."""
    box = {"type": "object", "properties": {"x": {"type": "number"}}}

    declared = declare_tools([{"name": "look", "parameters": {"properties": {"box": box}}}])

    assert "(_: {\n  box?: {\n    x?: number\n  }\n}) => any;" in declared


def test_a_schema_that_refers_to_itself_gets_a_name():
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}

    declared = declare_tools([{"name": "plant", "parameters": tree}])

    assert "interface parameters {\n  children?: Array<parameters>\n}\n" in declared
    assert "type plant = (_: parameters) => any;" in declared


@pytest.mark.parametrize(
    ("tool", "complaint"),
    [
        ({"description": "nameless"}, "has no name"),
        (
            {"name": "f", "parameters": {"properties": {"x": {"type": "int"}}}},
            "JSON schema type 'int'",
        ),
    ],
)
def test_a_malformed_tool_is_refused_by_name(tool: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        declare_tools([tool])
