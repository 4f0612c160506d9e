"""How everything is measured: clock, memory, correctness gate, rows, pages, figures. It knows no op and no peer."""
