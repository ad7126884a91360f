"""How do I know it helped? The lab's own benchmark, the interleaved check, the report, and ways to other
people's harnesses."""
