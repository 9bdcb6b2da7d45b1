//! (module map goes here)
