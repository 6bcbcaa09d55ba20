//! What an inspected container is called on a network: its name, stack, service, aliases, labels and health.
//!
//! libnetwork's calls carry none of this. Names that DNS could not answer are left out rather than changed, and so is
//! what is more than an endpoint may have.

use model::{Endpoint, Name};

use super::engine::{Attachment, Container};
use crate::control::Description;

/// How much of a container's id Docker gives as an alias, in characters.
const SHORT_ID: usize = 12;

/// Describes the container's part of one network.
pub(super) fn describe(container: &Container, attachment: &Attachment) -> Description {
    let plain = container.name.trim_start_matches('/');
    let name = valid(plain);
    let (stack, service) = stack_and_service(container);
    let short = container.id.get(..SHORT_ID).unwrap_or(&container.id);
    let mut aliases = Vec::new();
    for alias in &attachment.aliases {
        match valid(alias) {
            Some(alias)
                if alias.as_str() != short && alias.as_str() != plain && !aliases.contains(&alias) =>
            {
                aliases.push(alias);
            }
            Some(_) | None => {}
        }
    }
    aliases.truncate(Endpoint::ALIASES_MAX);
    let labels = &container.config.labels;
    let health = container.state.health.as_ref().map(|health| health.status.as_str());
    Description {
        name,
        stack,
        service,
        aliases,
        container: Some(container.id.clone()),
        labels: labels.iter().take(Endpoint::LABELS_MAX).map(|(k, v)| (k.clone(), v.clone())).collect(),
        healthy: !matches!(health, Some("starting" | "unhealthy")),
    }
}

/// Droveway's own labels first, then Rancher's, then Compose's. A stack alone is a stack; a service needs one.
fn stack_and_service(container: &Container) -> (Option<Name>, Option<Name>) {
    let label = |key: &str| container.config.labels.get(key).map(String::as_str);
    // Rancher writes "stack/service".
    let rancher = label("io.rancher.stack_service.name").and_then(|both| both.split_once('/'));
    let candidates = [
        (label("droveway.stack"), label("droveway.service")),
        (
            label("io.rancher.stack.name").or(rancher.map(|(stack, _)| stack)),
            rancher.map(|(_, service)| service),
        ),
        (label("com.docker.compose.project"), label("com.docker.compose.service")),
    ];
    for (stack, service) in candidates {
        if let Some(stack) = stack.and_then(valid) {
            return (Some(stack), service.and_then(valid));
        }
    }
    (None, None)
}

fn valid(text: &str) -> Option<Name> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn described(container: &serde_json::Value) -> Description {
        let container: Container = serde_json::from_value(container.clone()).unwrap();
        let attachment = container.network_settings.networks["managed"].clone();
        describe(&container, &attachment)
    }

    fn container(labels: &serde_json::Value, state: &serde_json::Value) -> serde_json::Value {
        json!({
            "Id": "f3a1c9d5e7b20123456789abcdef", "Name": "/db", "State": state, "Config": { "Labels": labels },
            "HostConfig": { "Dns": null },
            "NetworkSettings": { "Networks": { "managed": {
                "IPAMConfig": null, "Links": null, "Aliases": ["redis", "f3a1c9d5e7b2", "redis", "no good", "db"],
                "NetworkID": "n1", "EndpointID": "e1", "IPAddress": "10.42.64.98", "DriverOpts": null
            } } },
            "ResolvConfPath": "/var/lib/docker/containers/f3/resolv.conf"
        })
    }

    #[test]
    fn a_container_is_known_by_its_name_and_aliases_without_dockers_short_id() {
        let description = described(&container(&json!(null), &json!({ "Status": "running" })));
        assert_eq!(description.name.unwrap().as_str(), "db");
        assert_eq!(description.aliases, ["redis".parse().unwrap()]);
        assert_eq!(description.container.unwrap(), "f3a1c9d5e7b20123456789abcdef");
        assert!(description.healthy && description.stack.is_none() && description.labels.is_empty());
    }

    #[test]
    fn stack_and_service_come_from_droveways_ranchers_and_composes_labels_in_that_order() {
        let of = |labels: serde_json::Value| {
            let d = described(&container(&labels, &json!({})));
            format!("{:?} {:?}", d.stack, d.service)
        };
        let mut labels = json!({ "com.docker.compose.project": "shop", "com.docker.compose.service": "web" });
        assert_eq!(of(labels.clone()), "Some(shop) Some(web)");
        labels["io.rancher.stack_service.name"] = json!("rocket-chat/mongo");
        assert_eq!(of(labels.clone()), "Some(rocket-chat) Some(mongo)");
        labels["io.rancher.stack.name"] = json!("rocket-chat");
        assert_eq!(of(labels.clone()), "Some(rocket-chat) Some(mongo)");
        labels["droveway.stack"] = json!("mine");
        assert_eq!(of(labels.clone()), "Some(mine) None");
        labels["droveway.stack"] = json!("not a name");
        assert_eq!(of(labels), "Some(rocket-chat) Some(mongo)");
    }

    #[test]
    fn a_container_that_fails_or_has_not_passed_its_health_check_is_not_answered_with() {
        for (status, healthy) in
            [("healthy", true), ("starting", false), ("unhealthy", false), ("none", true)]
        {
            let state = json!({ "Health": { "Status": status, "FailingStreak": 0, "Log": [] } });
            assert_eq!(described(&container(&json!({}), &state)).healthy, healthy, "{status}");
        }
    }
}
