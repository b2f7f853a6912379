"""Scripts that are copied beside an export and run where detpost is not installed."""
