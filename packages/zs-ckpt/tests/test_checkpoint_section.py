"""The section `checkpoint` of a configuration."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from zs_ckpt.config import CheckpointConfig


def test_what_deepspeed_takes() -> None:
    data = {"tag_validation": "FAIL", "load_universal": True, "parallel_write": {"pipeline_stage": True}}
    data |= {"checkpoint_serialization": False, "writer": {"type": "fast"}, "use_node_local_storage": False}
    parsed = CheckpointConfig.model_validate(data)
    assert parsed.tag_validation == "Fail" and parsed.load_universal
    assert CheckpointConfig.model_validate({"tag_validation": None, "load_universal": "auto"}) == CheckpointConfig()


@pytest.mark.parametrize(
    "data", [{"use_node_local_storage": True}, {"tag_validation": "sometimes"}, {"tag_validation_mode": "eager"}]
)
def test_what_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CheckpointConfig.model_validate(data)
