"""`run` and `mesh`: where products are kept, and how devices and processes are arranged."""

from __future__ import annotations

from dataclasses import dataclass

from fac_jax.config.checks import check


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps its products."""

    dir: str = "runs/default"
    """Run directory; every product of the run is written below it."""
    seed: int = 0
    """Seed of everything random in the run (initialisation, shuffling, sampling)."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; both axes are 1 on a laptop."""

    data: int | None = None
    """Devices along the batch axis; by default all that `feature` leaves."""
    feature: int = 1
    """Devices along the SAE-feature and model-parallel axis."""
    coordinator: str | None = None
    """Several processes as one run: HOST:PORT of process 0, the same for all, or auto where JAX finds them (SLURM, Open
    MPI, Cloud TPU). By default this process is alone."""
    processes: int | None = None
    """How many processes there are; auto finds it."""
    process_id: int | None = None
    """Which of them this is, from 0; auto finds it."""
    start_timeout_s: int = 300
    """Seconds in which all processes must have started."""
    step_timeout_s: float = 20.0
    """Several processes: seconds without a finished training step (or ten times the slowest before, if that is longer)
    after which a process ends itself, and so all of them."""

    def __post_init__(self) -> None:
        explicit, parts = self.coordinator not in (None, "auto"), (self.processes, self.process_id)
        check(
            not explicit or (":" in str(self.coordinator) and None not in parts),
            f"mesh.coordinator {self.coordinator} needs the form HOST:PORT, mesh.processes and mesh.process_id (it has "
            f"{self.processes} and {self.process_id}); or set it to auto",
        )
        check(
            self.coordinator is not None or parts == (None, None),
            "mesh.processes and mesh.process_id need mesh.coordinator: set it to HOST:PORT of process 0",
        )
        count, index = self.processes, self.process_id
        check(
            count is None or index is None or 0 <= index < count,
            f"mesh.process_id is {index}; it must lie in 0 to {(count or 0) - 1}, as mesh.processes is {count}",
        )
        for name, least in {"start_timeout_s": 1, "step_timeout_s": 1}.items():
            check(getattr(self, name) >= least, f"mesh.{name} is {getattr(self, name)}; it must be at least {least}")
