"""What people see of a run: metrics, trackers, console, plots and a report page."""
