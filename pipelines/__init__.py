"""The command line, the sample project and what else wires scorer and trainer together."""

from pipelines.own_packages import leave_current_folder

leave_current_folder()  # before anything else is imported
