"""How any process of ours runs: commands, configs, devices, files and run directories. Imports no other room."""
