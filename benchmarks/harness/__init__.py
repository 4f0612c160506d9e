"""How everything is measured: clock, memory, correctness gate, rows, CSVs, pages. It knows no op and no peer."""
