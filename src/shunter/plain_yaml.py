"""YAML of others to plain values in bounded time, by the numbers and words of YAML 1.2, and such values to YAML."""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["MAX_BYTES", "as_yaml", "parse_yaml"]

MAX_BYTES = 200_000
"""Of a file; a second of reading."""


def parse_yaml(text: str) -> Any:
    """The values of a text: 3e-4 is a number and 010 ten, "no" is a word.

    Raises:
        ValueError: where it is no YAML, too deep, or has an alias, which can grow at will, or a key twice in one place.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (yaml.YAMLError, LookupError, AttributeError, TypeError) as error:  # of tags that lie, as in !!int ''
        raise ValueError(str(error) if isinstance(error, yaml.YAMLError) else "a tag does not fit its value") from None


def as_yaml(values: Any, **options: Any) -> str:
    """Values as YAML that `parse_yaml` reads back equal; `options` are of `yaml.dump`."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, **options)


class _Loader(yaml.SafeLoader):
    """Takes no aliases and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{self.peek_event().anchor} is not read; write its value out")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.YAMLError(f"the key {key.value!r} comes twice; leave one of them out")
                keys.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers; writes a value out as often as it comes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_INT_TAG, _BOOL_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:bool"
_INT = re.compile(r"[-+]?([0-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


def _int(loader: Any, node: Any) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0) if re.match(r"[-+]?0[bx]", text) else int(text)


_Loader.add_constructor(_INT_TAG, _int)
for _kind in (_Loader, _Dumper):
    # What YAML 1.1 takes for numbers and truth, and YAML 1.2 does not: 010 (8) and 1:30 (90); yes, no, on and off.
    _kind.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] != _INT_TAG and (rule[0] != _BOOL_TAG or first in set("tTfF"))]
        for first, rules in _kind.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver(_INT_TAG, _INT, list("-+0123456789"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
