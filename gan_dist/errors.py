"""Errors that end a run, each with the exit code that a launcher acts on.

64, 65 and 78 must not be retried: the same command would fail again. 170 to 173 must be.
"""

from typing import ClassVar


class GanDistError(Exception):
    """An error with a message for the user: the flag, the value, the rule, the way out."""

    exit_code: ClassVar[int] = 1


class UsageError(GanDistError, ValueError):
    """A bad flag, or a resume with another model or data order."""

    exit_code = 64


class DataError(GanDistError):
    """A data file is missing its content: truncated, damaged, or not what it should be."""

    exit_code = 65


class CheckpointError(GanDistError):
    """There are checkpoint files, and none of them can be used."""

    exit_code = 65


class Diverged(GanDistError):
    """Training ended in numbers that are not finite."""

    exit_code = 65


class EnvironmentFault(GanDistError):
    """This machine cannot run it: no such GPU, out of memory, a folder that cannot be written, a bad TF_CONFIG."""

    exit_code = 78


class StopRequested(GanDistError):
    """Stopped by a signal; everything is committed."""

    exit_code = 170


class ClusterNotFormed(GanDistError):
    """The workers of a cluster did not find each other in time; start all of them again."""

    exit_code = 173


class PeerLost(GanDistError):
    """Another worker of the cluster is gone; start all workers again."""

    exit_code = 171
