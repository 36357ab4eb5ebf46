"""How the global batch is laid out over replicas. Whoever needs a batch size takes a `Layout`."""

import dataclasses
from typing import Any

from gan_dist.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Layout:
    """`global_batch` images a step, `per_replica` of them on each of `replicas`, in the order of replica numbers."""

    global_batch: int
    replicas: int

    def __post_init__(self) -> None:
        if self.global_batch % self.replicas == 0:
            return
        below = self.global_batch // self.replicas * self.replicas
        sizes = f"{below} and {below + self.replicas}" if below else f"{self.replicas}"
        raise UsageError(
            f"--global_batch_size={self.global_batch} does not divide over {self.replicas} replicas; "
            f"the nearest that do: {sizes}. Or change --num_devices or the number of workers."
        )

    @property
    def per_replica(self) -> int:
        return self.global_batch // self.replicas

    def first_row(self, replica: Any) -> Any:
        """The row of the global batch at which a replica's share starts; for a number or a scalar tensor."""
        return replica * self.per_replica
