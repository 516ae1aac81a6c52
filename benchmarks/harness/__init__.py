"""What all experiments share: servers, methods, tasks, statistics, result files, and the command line."""
