//! What may be changed while a server runs.
//!
//! A change holds until the server ends: what it begins with is what its command line says.
//!
//! Owns: the form of settings, and who is asked to change which. Does not own: what each does (`fill`, `mirror`,
//! `image::index`, `telemetry`).

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use tracing::level_filters::LevelFilter;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Answered, Api, Problem, Shared, gather, read_order};
use super::operated::{Operated, Refusal};
use super::status::Complaint;
use crate::telemetry;

/// `GET` and `PATCH /v1/settings`. Each has the name and the meaning of a flag of the command line; sizes and rates are
/// numbers of bytes.
///
/// In an answer, what is not there this server does not have. In an order, what is not there stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How much is logged.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "named")]
    #[schema(nullable = false)]
    pub log_level: Option<LogLevel>,
    /// Bytes per second of all that a mirror fetches ahead of demand; `null`: what the link takes.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "named")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub fill_rate: Option<Option<u64>>,
    /// The same for each image; `null`: no limit of its own.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "named")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub image_fill_rate: Option<Option<u64>>,
    /// Bytes that the cache of all mirrors may take; `null`: as much as there is. What is too much is evicted at once.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "named")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub cache_size: Option<Option<u64>>,
    /// Bytes of the cache's file system that are left free.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "named")]
    #[schema(nullable = false)]
    pub reserve: Option<u64>,
    /// Bytes per second that are read to make missing manifests (`serve --index`); `null`: as fast as it goes.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "named")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub index_rate: Option<Option<u64>>,
}

/// What is there, `null` too: else it would look as if it were not.
fn named<'de, D: Deserializer<'de>, T: Deserialize<'de>>(value: D) -> Result<Option<T>, D::Error> {
    T::deserialize(value).map(Some)
}

/// How much is logged: this, and what is worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What went wrong.
    Error,
    /// What may go wrong.
    Warn,
    /// What operators did, and what happened.
    Info,
    /// What helps to find out why.
    Debug,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::OFF,
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
        }
    }
}

impl From<LevelFilter> for LogLevel {
    fn from(level: LevelFilter) -> Self {
        match level {
            LevelFilter::OFF => Self::Off,
            LevelFilter::ERROR => Self::Error,
            LevelFilter::WARN => Self::Warn,
            LevelFilter::INFO => Self::Info,
            _ => Self::Debug,
        }
    }
}

impl Settings {
    /// The names of all of them.
    pub const NAMES: [&str; 6] = ["log_level", "fill_rate", "image_fill_rate", "cache_size", "reserve", "index_rate"];

    /// Those whose names `wanted` says yes to.
    #[must_use]
    pub fn only(&self, wanted: impl Fn(&str) -> bool) -> Self {
        let fields: Map<_, _> = self.by_name().into_iter().filter(|(name, _)| wanted(name)).collect();
        // It was one before.
        serde_json::from_value(Value::Object(fields)).unwrap_or_default()
    }

    /// Whether the one of this name is named.
    pub fn has(&self, name: &str) -> bool {
        self.by_name().contains_key(name)
    }

    /// By their names, as in JSON.
    fn by_name(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => fields,
            _ => Map::new(),
        }
    }

    /// What is wrong with an order, whoever it is for.
    fn complaint(&self) -> Option<String> {
        let zero = self.by_name().into_iter().find(|(name, value)| name != "reserve" && *value == 0);
        zero.map(|(name, _)| format!("{name}: more than nothing; null is no limit"))
    }
}

/// `GET` and `PATCH /v1/settings`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(settings, change_settings))
}

/// The settings as they are now.
///
/// `headwater settings`.
#[utoipa::path(get, path = "/v1/settings", tag = "settings", responses((status = 200, body = Settings)))]
async fn settings(State(api): Shared) -> Json<Settings> {
    Json(now(api.operated()))
}

/// Change settings.
///
/// What is named is changed, all of it or nothing, until the server ends. The answer is all settings as they are then.
/// `headwater settings NAME=VALUE...`.
#[utoipa::path(patch, path = "/v1/settings", tag = "settings", request_body = Settings,
    responses((status = 200, body = Settings), (status = 409, description = "Not as things are", body = Complaint)))]
async fn change_settings(State(api): Shared, body: Body) -> Answered<Settings> {
    let order: Settings = read_order(body).await?;
    if let Some(why) = order.complaint() {
        return Err(Problem::new(StatusCode::BAD_REQUEST, why));
    }
    Ok(gather(api, move |api| change(api.operated(), &order)).await?.map(Json)?)
}

fn now(operated: &dyn Operated) -> Settings {
    Settings { log_level: telemetry::log_level().map(LogLevel::from), ..operated.settings() }
}

/// Changes what is named, or nothing, and logs it. Gives all of them as they are then. Blocks.
pub fn change(operated: &dyn Operated, order: &Settings) -> Result<Settings, Refusal> {
    let (before, wanted) = (now(operated).by_name(), order.by_name());
    if let Some(name) = wanted.keys().find(|name| !before.contains_key(*name)) {
        let known: Vec<_> = before.keys().cloned().collect();
        let why = format!("this server has no {name}: what can be changed here is {}", known.join(", "));
        return Err(Refusal::Conflict(why));
    }
    operated.change_settings(order)?;
    let tell = || {
        for (name, to) in wanted.iter().filter(|(name, to)| before.get(*name) != Some(to)) {
            let from = before.get(name).map_or_else(String::new, Value::to_string);
            tracing::info!(setting = name, from, %to, "a setting was changed");
        }
    };
    match (order.log_level.map(LevelFilter::from), telemetry::log_level()) {
        (Some(level), Some(old)) if level < old => {
            // While it is still heard.
            tell();
            telemetry::set_log_level(level);
        }
        (Some(level), _) => {
            telemetry::set_log_level(level);
            tell();
        }
        (None, _) => tell(),
    }
    Ok(now(operated))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(value: Value) -> Result<Settings, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_null_is_named_and_what_is_missing_is_not() {
        let order = parsed(json!({"fill_rate": null, "cache_size": 4096})).unwrap();
        assert_eq!((order.fill_rate, order.cache_size, order.image_fill_rate), (Some(None), Some(Some(4096)), None));
        assert_eq!(Value::from(order.by_name()), json!({"fill_rate": null, "cache_size": 4096}));
        assert_eq!(parsed(json!({})).unwrap(), Settings::default());
        for wrong in [
            json!({"fill-rate": 1}),
            json!({"fill_rate": "1M"}),
            json!({"fill_rate": -1}),
            json!({"log_level": null}),
            json!({"log_level": "loud"}),
            json!({"reserve": null}),
        ] {
            assert!(parsed(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nothing_is_no_rate_and_no_size() {
        for name in ["fill_rate", "image_fill_rate", "cache_size", "index_rate"] {
            let order = parsed(json!({ name: 0 })).unwrap();
            assert!(order.complaint().is_some_and(|why| why.contains(name)), "{name}");
        }
        assert_eq!(parsed(json!({"reserve": 0, "fill_rate": 1})).unwrap().complaint(), None);
    }

    #[test]
    fn all_names_are_known() {
        let all =
            Settings::NAMES.map(|name| (name.to_owned(), if name == "log_level" { json!("info") } else { json!(1) }));
        let all = parsed(Value::Object(all.into_iter().collect())).unwrap();
        assert!(Settings::NAMES.iter().all(|name| all.has(name)) && all.by_name().len() == Settings::NAMES.len());
        let only = all.only(|name| name == "reserve");
        assert_eq!(only, Settings { reserve: Some(1), ..Settings::default() });
    }

    #[test]
    fn levels_are_those_of_the_log() {
        for level in [LogLevel::Off, LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug] {
            assert_eq!(LogLevel::from(LevelFilter::from(level)), level);
        }
    }
}
