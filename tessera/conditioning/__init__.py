"""What a network is conditioned on beside the noisy image."""

from tessera.conditioning.condition import Condition, NetworkFunction, check_inputs, dropout_stream
from tessera.conditioning.fields import NULL_LABEL, ConditionField, LabelField, condition_field

__all__ = [
    "NULL_LABEL", "Condition", "ConditionField", "LabelField", "NetworkFunction", "check_inputs", "condition_field",
    "dropout_stream",
]  # fmt: skip
