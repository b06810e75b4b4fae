"""The commands of ``elle-mp``: one file each, thin; torch is imported only when a command runs."""
