//! Which ports of the host are published, and by whom.

use std::collections::{BTreeMap, BTreeSet};

use model::api::{ApiError, ErrorCode};
use model::{EndpointId, Name, PublishedPort};

use super::Book;

impl Book {
    pub(super) fn check_ports(
        &self,
        own: Option<&EndpointId>,
        mut ports: Vec<PublishedPort>,
    ) -> Result<Vec<PublishedPort>, ApiError> {
        if ports.is_empty() {
            return Ok(ports);
        }
        let mut taken: BTreeMap<(model::Protocol, u16), String> = BTreeMap::new();
        for record in self.records.values().filter(|record| Some(&record.endpoint.id) != own) {
            for port in &record.endpoint.ports {
                let holder = record.endpoint.name.as_ref().map_or(record.endpoint.id.as_str(), Name::as_str);
                taken.insert((port.protocol, port.host_port), format!("container {holder}"));
            }
        }
        let own_ports: BTreeSet<_> = own
            .and_then(|id| self.records.get(id))
            .map(|record| record.endpoint.ports.iter().map(|port| (port.protocol, port.host_port)).collect())
            .unwrap_or_default();
        for port in &mut ports {
            let free = |number: u16, taken: &BTreeMap<_, _>| {
                let name = (port.protocol, number);
                !taken.contains_key(&name) && (own_ports.contains(&name) || can_bind(port.protocol, number))
            };
            if port.host_port == 0 {
                port.host_port = (32_768..=60_999).find(|number| free(*number, &taken)).ok_or_else(|| {
                    ApiError::new(ErrorCode::Exhausted, "no port from 32768 to 60999 is free on this host")
                })?;
            } else if !free(port.host_port, &taken) {
                let holder = taken.get(&(port.protocol, port.host_port)).cloned();
                let holder = holder.unwrap_or_else(|| "another program of this host".to_owned());
                let message =
                    format!("port {} is published by {holder} already; choose another", port.host_port);
                return Err(ApiError::new(ErrorCode::Conflict, message));
            }
            taken.insert((port.protocol, port.host_port), "this container".to_owned());
        }
        Ok(ports)
    }
}

fn can_bind(protocol: model::Protocol, port: u16) -> bool {
    let address = (std::net::Ipv4Addr::UNSPECIFIED, port);
    match protocol {
        model::Protocol::Tcp => std::net::TcpListener::bind(address).is_ok(),
        model::Protocol::Udp => std::net::UdpSocket::bind(address).is_ok(),
    }
}
