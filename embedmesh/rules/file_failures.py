"""Failures of files, batches and jobs, besides those of `rules.errors`."""

from embedmesh.rules.errors import CallerFailure, Failure, Fault, Retry


class StorageFull(Failure):
    """The disk that files are kept on has no room now, or object storage is away."""

    code = "storage_full"
    fault = Fault.US
    retry = Retry.LATER


class TooMuchKept(CallerFailure):
    """The account keeps as many files, or bytes of files, as it may."""

    code = "storage_quota"


class JobOver(CallerFailure):
    """The job is closed, or has expired: nothing more is charged to it."""

    code = "job_over"
