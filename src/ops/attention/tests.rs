//! Metamorphic relations: they need no oracle, and catch what the reference and a kernel could both have wrong.
