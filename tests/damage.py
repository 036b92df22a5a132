"""Folders with one byte, key or value changed, as Hypothesis draws it."""

import json
from pathlib import Path

from hypothesis import strategies as st

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just("DELETE"),
)


def keys(holder: dict | list) -> list:
    return sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))


def damaged(folder: Path, draw: st.DataObject, files: list[str]) -> str:
    """One byte, key or value of one of the files is changed, added to or gone; says what was done."""
    name = draw.draw(st.sampled_from([name for name in files if (folder / name).is_file()]))
    file = folder / name
    if name.endswith(".json") and draw.draw(st.booleans()):
        content = json.loads(file.read_text())
        holder, key = content, draw.draw(st.sampled_from(keys(content)))
        while isinstance(holder[key], (dict, list)) and 0 < len(holder[key]) < 50 and draw.draw(st.booleans()):
            holder = holder[key]
            key = draw.draw(st.sampled_from(keys(holder)))
        value = draw.draw(VALUES)
        if value == "DELETE":
            del holder[key]
        else:
            holder[key] = value
        file.write_text(json.dumps(content))
        return f"{name} {key} {value!r}"
    data = bytearray(file.read_bytes())
    kind = draw.draw(st.sampled_from(["flip", "cut", "drop"]))
    place = draw.draw(st.integers(0, min(len(data) - 1, 3000 if draw.draw(st.booleans()) else len(data) - 1)))
    if kind == "flip":
        data[place] ^= 1 << draw.draw(st.integers(0, 7))
    elif kind == "cut":
        data = data[:place]
    else:
        del data[place]
    file.write_bytes(data)
    return f"{name} {kind} {place}"
