//! Which clients should be moved where, so that servers share their load; and when a standby should help them.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the words |
//! | [`fleet`] | servers and clients, put together from what each server says of itself |
//! | [`plan`] | the fewest moves that bring all within tolerance |
//! | [`steady`] | when to act at all, and on whom: what keeps it from oscillating |
//! | [`standby`] | when the next standby is brought in, and when it is stood down |
//!
//! Pure: whoever decides by this asks servers, carries the moves out, and tells what came of them (`headwater balance`).

pub mod fleet;
pub mod plan;
pub mod standby;
pub mod steady;
