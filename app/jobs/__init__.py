"""Training jobs: files and jobs in a folder, and a supervisor that runs them in processes of their own."""

from app.jobs.files import FileStore, TrainingFile
from app.jobs.job import Event, Job, JobError, Options, Status
from app.jobs.publisher import Publisher
from app.jobs.run import Parts
from app.jobs.store import JobStore
from app.jobs.supervisor import Supervisor

__all__ = [
    "Event",
    "FileStore",
    "Job",
    "JobError",
    "JobStore",
    "Options",
    "Parts",
    "Publisher",
    "Status",
    "Supervisor",
    "TrainingFile",
]
