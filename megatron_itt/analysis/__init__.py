"""Analysis of run folders and exports: measurements, figures, report, status, study. No megatron."""
