"""One reduction of all gradients over the replicas, Adam as a pure function, and the assignment that may be skipped."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reduced:
    """Gradients summed over replicas.

    Attributes:
        gradients: In the order given.
        norm: Euclidean norm of all of them together.
        finite: Whether the norm and all extras are finite, which no gradient that is not finite lets the norm be. The
            same on every replica.
        extras: The other sums, `[E]`.
    """

    gradients: list[tf.Tensor]
    norm: tf.Tensor
    finite: tf.Tensor
    extras: tf.Tensor


def reduce_packed(
    gradients: Sequence[tf.Tensor], extras: tf.Tensor, all_reduce: Callable[[tf.Tensor], tf.Tensor]
) -> Reduced:
    """Sums gradients and `extras` (`[E]`, same type) over replicas, in one all-reduce."""
    sizes: list[Any] = [g.shape.num_elements() for g in (*gradients, extras)]
    packed = all_reduce(tf.concat([*(tf.reshape(g, [-1]) for g in gradients), extras], 0))
    *flat, extras = tf.split(packed, sizes)
    summed = [tf.reshape(f, g.shape) for f, g in zip(flat, gradients, strict=True)]
    norm = tf.linalg.global_norm(summed)
    # A sum over replicas is finite only if every replica's part is.
    finite = tf.math.is_finite(norm) & tf.reduce_all(tf.math.is_finite(extras))
    return Reduced(summed, norm, finite, extras)


def assign_where(
    where: tf.Tensor, variables: Sequence[tf.Variable], new: Sequence[tf.Tensor], old: Sequence[tf.Tensor]
) -> None:
    """Gives this replica's copies of `variables` the values `new`, or leaves them at `old` where `where` is false.

    The values must be the same on every replica: `variable.assign` would start a reduction of its own. The choice is
    between whole tensors, so it costs no pass over them.
    """
    chosen = tf.cond(where, lambda: list(new), lambda: list(old))
    for variable, value in zip(variables, chosen, strict=True):
        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1, with epsilon as in the text after it), as in Keras."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float

    @staticmethod
    def slots(name: str) -> tuple[str, str]:
        """The names of a variable's first and second moment."""
        return f"{name}_m", f"{name}_v"

    def update(self, gradients: Values, values: Values, state: Values) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values after one update, and the state (`count` and the slots) after it. Changes nothing in place."""
        step = tf.cast(state["count"] + 1, tf.float64)
        # The corrections of both moments, in the step size.
        rate = self.learning_rate * tf.sqrt(1 - tf.pow(tf.constant(self.beta2, tf.float64), step))
        rate /= 1 - tf.pow(tf.constant(self.beta1, tf.float64), step)
        new_values, new_state = {}, {"count": state["count"] + 1}
        for name, gradient in gradients.items():
            slot_m, slot_v = self.slots(name)
            m = state[slot_m] + (gradient - state[slot_m]) * (1 - self.beta1)
            v = state[slot_v] + (tf.square(gradient) - state[slot_v]) * (1 - self.beta2)
            new_values[name] = values[name] - tf.cast(rate, gradient.dtype) * m / (tf.sqrt(v) + self.epsilon)
            new_state[slot_m], new_state[slot_v] = m, v
        return new_values, new_state
