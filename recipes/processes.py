"""Jobs of several processes: joining one, and leaving it without holding up the others."""

import os
import sys
import time

import jax

# A process that dies is noticed by the others after about this long, where no broken connection
# tells them sooner.
HEARTBEAT_SECONDS = 30


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the job that the flags of the same names describe; no coordinator: a job of one.

    Args:
      coordinator: host:port of process 0, or "auto" to read all three from a cluster's environment
        (Slurm, Open MPI, TPU slices and what else jax knows).
      num_processes: in the job.
      process_id: of this one, from 0.

    Raises:
      ValueError: a flag is missing or wrong.
      RuntimeError: the other processes do not answer.
    """
    # The only collectives that a CPU has across processes; must be set before devices exist.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT")
        return
    try:
        if coordinator == "auto":
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
            return
    except ValueError as error:
        raise ValueError(
            f"--coordinator=auto: no cluster was recognised ({error}); give --coordinator="
            "HOST:PORT --num_processes=N --process_id=I"
        ) from None
    if num_processes is None or process_id is None:
        raise ValueError("--coordinator needs --num_processes=N and --process_id=I, from 0")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id}: it must be in 0..{num_processes - 1}, as "
                         f"--num_processes={num_processes}")
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise ValueError(f"--coordinator={coordinator}: it must be HOST:PORT")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id,
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"process {process_id} of {num_processes} could not join the job at {coordinator}: "
            f"{error}") from None


def leave(code: int) -> None:
    """Ends this process at once if others share its job; they then notice, and end too.

    The usual way out would wait for processes that wait for this one.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(1)  # The others lose their coordinator: let them report what they met first.
    os._exit(code)
