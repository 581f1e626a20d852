"""Sites of a captured graph, by what they compute: attention, MLPs, stems."""
