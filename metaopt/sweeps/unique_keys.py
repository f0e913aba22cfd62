"""YAML that is refused where a key stands twice: the format forbids it, and PyYAML lets the last one win."""

from __future__ import annotations

import yaml


class UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, for mappings without repeated keys.

    They are compared as they are written, before ``<<`` merges others into them, which may well say the same.

    Example:
        >>> yaml.load("{a: &a {lr: 1, on: 2}, b: {<<: *a, lr: 3}}", UniqueKeys)
        {'a': {'lr': 1, True: 2}, 'b': {'lr': 3, True: 2}}
        >>> yaml.load("{lr: 1, 'lr': 2}", UniqueKeys)
        Traceback (most recent call last):
        ...
        yaml.error.MarkedYAMLError: the key 'lr' stands here a second time
          in "<unicode string>", line 1, column 9:
            {lr: 1, 'lr': 2}
                    ^
    """

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode | None:
        """A mapping of the text.

        Raises:
            yaml.MarkedYAMLError: a key stands in it twice.
        """
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if node is not None else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} stands here a second time"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node
