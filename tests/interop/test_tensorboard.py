"""TensorBoard reads back every scalar of metrics.jsonl."""
import struct

from conftest import read_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def as_float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def test_every_scalar_is_read_back(made):
    run = made / "run"
    metrics = read_jsonl(run / "metrics.jsonl")
    assert sum(m["kind"] == "train" for m in metrics) == 24
    assert any(m["kind"] == "valid" for m in metrics)

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    read = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    expected = {
        (f"{m['kind']}/{key}", m["step"]): as_float32(value)
        for m in metrics
        for key, value in m.items()
        if key not in ("kind", "step") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    assert read == expected
