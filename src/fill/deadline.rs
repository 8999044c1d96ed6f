//! Which of several orders goes first, and which will be late.

use std::fmt;
use std::str::FromStr;

/// How an order with a deadline uses the time until then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// As late as it can be done.
    Jit,
    /// At once.
    Aggressive,
    /// By slack, and at once while nothing else is to be done.
    #[default]
    Hybrid,
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Jit => "jit",
            Self::Aggressive => "aggressive",
            Self::Hybrid => "hybrid",
        })
    }
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "jit" => Ok(Self::Jit),
            "aggressive" => Ok(Self::Aggressive),
            "hybrid" => Ok(Self::Hybrid),
            _ => Err("the strategies are jit, aggressive and hybrid".to_owned()),
        }
    }
}
