import json

import pytest

from tersor.config import parse_config_list, read_config_file
from tersor.errors import ConfigError, ConflictError, InvalidValueError

CONFIG_LIST = [
    {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": [4, 4]},
    {"exclude": True, "op_names": ["fc"]},
]
YAML = """
- op_types: [Conv2d]
  sparse_ratio: 0.5
  granularity: [4, 4]
- exclude: true
  op_names: [fc]
"""


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", YAML), ("a.yml", YAML), ("a.json", json.dumps(CONFIG_LIST)), ("A.YAML", YAML)]
)
def test_files_hold_config_lists(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert read_config_file(path) == CONFIG_LIST
    written = [entry.as_config() for entry in parse_config_list(str(path), "pruning")]
    assert written == CONFIG_LIST


@pytest.mark.parametrize(
    ("name", "text", "error", "texts"),
    [
        ("missing.yaml", None, ConfigError, ["No such file", "Check the path"]),
        ("a.toml", "", ConfigError, [".yaml", ".json"]),
        ("a.yaml", "- op_types: [Conv2d", ConfigError, ["malformed", "line 1"]),
        ("a.json", '[{"op_types": ]', ConfigError, ["malformed", "line 1 column 15"]),
        ("a.yaml", "", InvalidValueError, ["None is no list"]),
        ("a.yaml", "op_types: [Conv2d]", InvalidValueError, ["Put the entry into a list"]),
        ("a.yaml", "- {op_names: fc, sparsity: 2}", InvalidValueError, ["config_list[0]['sparsity']", "2 is no ratio"]),
        ("a.json", '[{"op_names": "fc", "sparsity": NaN}]', InvalidValueError, ["config_list[0]['sparsity']", "nan"]),
        ("a.yaml", "- {op_names: a, op_names: b}", ConflictError, ["'op_names' stands twice", "Keep one"]),
        ("a.json", '[{"op_names": "a", "op_names": "b"}]', ConflictError, ["'op_names' stands twice", "Keep one"]),
        ("a.yaml", "- !!python/object/apply:os.getcwd []", ConfigError, ["malformed"]),
    ],
)
def test_errors_name_the_file(tmp_path, name, text, error, texts):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(error) as caught:
        parse_config_list(path, "pruning")
    for expected in (str(path), *texts):
        assert expected in str(caught.value)


def test_what_is_no_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_config_file(path)


def test_yaml_merge_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("- &base {op_names: a, sparse_ratio: 0.5}\n- {<<: *base, op_names: b}\n")
    assert read_config_file(path)[1] == {"op_names": "b", "sparse_ratio": 0.5}
