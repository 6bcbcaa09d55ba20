//! Programs at the ingress of a router's devices (`bpf(2)`, `tc-bpf(8)`), and at the queues of TUN devices ([`steer`]).
//!
//! A program is the one filter for IPv4 of its device's `clsact` queueing discipline, in direct-action mode. The filter holds
//! it: it works on when we are gone. Its name says which text it was made of, and for which devices.
//!
//! Invariant: a program that is shown with its digest is alone at its device, and the devices it names are those of that
//! name.

mod assembly;
mod load;
pub(crate) mod steer;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage::{
    self, DelQueueDiscipline, GetQueueDiscipline, GetTrafficFilter, NewQueueDiscipline, NewTrafficFilter,
};
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use nix::errno::Errno;
use nix::libc;
use plan::object::{Ifname, Program};

use crate::error::{At, Error};
use crate::namespace::Namespace;
use crate::netlink::{Refusal, request};

/// What `observe` shows as the digest of what is at a device and not as we made it.
const ALTERED: &str = "altered";
const CLSACT: &str = "clsact";
/// Where the filters for what comes in hang.
const INGRESS: TcHandle = TcHandle { major: TcHandle::CLSACT.major, minor: TcHandle::MIN_INGRESS };
/// Priority 1 (the upper half), for IPv4 (the lower, in network order). Frames with a VLAN tag are of another protocol.
const FIRST_OF_IPV4: u32 = 1 << 16 | (libc::ETH_P_IP as u16).to_be() as u32;
const HANDLE: TcHandle = TcHandle { major: 0, minor: 1 };

/// Loads the program and hangs it at the device, in place of all that is there.
pub(crate) fn attach(home: &mut Namespace, device: &Ifname, program: &Program) -> Result<(), Error> {
    let attempted = format!("attach a program to {device} of {}", At(&home.place));
    let at = home.index(device)?;
    let mut named = Vec::new();
    let mut unknown = None;
    let instructions = assembly::assemble(&program.text, |name| {
        let found = home.index(&Ifname::new(name));
        named.extend(found.as_ref().ok().map(|index| format!(" {name}={index}")));
        found.map_err(|error| unknown = Some(error)).ok()
    });
    let instructions = match (instructions, unknown) {
        (_, Some(error)) => return Err(error),
        (Err(why), None) => return Err(Error::words(attempted, format!("its text is wrong: {why}"))),
        (Ok(instructions), None) => instructions,
    };
    named.sort_unstable();
    named.dedup();
    let name = format!("{}{}", program.digest, named.concat());
    let loaded = load::load(load::Kind::Classify, &instructions)?;
    detach(home, device)?;

    let mut qdisc = message(at, TcHandle::CLSACT, TcHandle { major: TcHandle::CLSACT.major, minor: 0 });
    qdisc.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
    let mut filter = message(at, INGRESS, HANDLE);
    filter.header.info = FIRST_OF_IPV4;
    let options = [
        TcFilterBpfOption::ProgFd(loaded.number()),
        TcFilterBpfOption::ProgName(name),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options.map(TcOption::Bpf).into()),
    ];
    let new = NLM_F_CREATE | NLM_F_EXCL;
    let answers = home
        .route
        .requests(vec![request(NewQueueDiscipline(qdisc), new), request(NewTrafficFilter(filter), new)]);
    let refusal = answers.into_iter().find_map(Result::err);
    refusal.map_or(Ok(()), |refusal| Err(refusal.to_error(attempted)))
}

/// Takes all that hangs at the device away; nothing being there is fine.
pub(crate) fn detach(home: &mut Namespace, device: &Ifname) -> Result<(), Error> {
    let Some(index) = home.mirror.index(device) else { return Ok(()) };
    let qdisc = message(index, TcHandle::CLSACT, TcHandle { major: TcHandle::CLSACT.major, minor: 0 });
    match home.route.request(request(DelQueueDiscipline(qdisc), 0)) {
        // EINVAL: nothing is there. ENODEV: nor is the device.
        Err(refusal) if !matches!(refusal.errno, Errno::ENOENT | Errno::EINVAL | Errno::ENODEV) => {
            Err(refusal.to_error(format!("detach the program from {device} of {}", At(&home.place))))
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

/// What hangs at the ingress of devices now: the device's index, and its filters.
pub(crate) fn read(home: &mut Namespace) -> Result<Vec<(u32, Vec<TcMessage>)>, Refusal> {
    let qdiscs = home.route.dump(&request(GetQueueDiscipline(TcMessage::default()), 0))?;
    let mut found = Vec::new();
    for qdisc in qdiscs {
        let NewQueueDiscipline(qdisc) = qdisc else { continue };
        if !is_clsact(&qdisc) {
            continue;
        }
        let Ok(index) = u32::try_from(qdisc.header.index) else { continue };
        let query = GetTrafficFilter(message(index, INGRESS, TcHandle::UNSPEC));
        let filters = match home.route.dump(&request(query, 0)) {
            Ok(filters) => filters,
            // Gone meanwhile: an event will tell.
            Err(refusal) if matches!(refusal.errno, Errno::ENODEV | Errno::EINVAL) => Vec::new(),
            Err(refusal) => return Err(refusal),
        };
        found.push((index, filters.into_iter().filter_map(filter).collect()));
    }
    Ok(found)
}

/// Whether an event is about what hangs at the ingress of a device.
pub(crate) fn concerns(message: &TcMessage) -> bool {
    is_clsact(message) || message.header.parent == INGRESS
}

/// The digest of what hangs at a device, given the index of the device of a name.
pub(crate) fn digest(filters: &[TcMessage], index: impl Fn(&str) -> Option<u32>) -> String {
    let ours = |name: &str| {
        let (digest, devices) =
            name.match_indices(' ').nth(1).map_or((name, ""), |(at, _)| name.split_at(at));
        let same = devices.split_whitespace().all(|device| {
            device
                .split_once('=')
                .is_some_and(|(name, number)| number.parse().is_ok_and(|number| index(name) == Some(number)))
        });
        same.then(|| digest.to_owned())
    };
    match filters {
        [one] if one.header.info == FIRST_OF_IPV4 => name(one).and_then(ours),
        _ => None,
    }
    .unwrap_or_else(|| ALTERED.to_owned())
}

/// A filter; the kernel also tells of the list that it is in, under handle 0.
fn filter(reply: RouteNetlinkMessage) -> Option<TcMessage> {
    match reply {
        NewTrafficFilter(filter) if filter.header.handle != TcHandle::UNSPEC => Some(filter),
        _ => None,
    }
}

/// The name of a program that decides by itself.
fn name(filter: &TcMessage) -> Option<&str> {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let (mut name, mut decides) = (None, false);
    for option in options.flatten() {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(text)) => name = Some(text.as_str()),
            TcOption::Bpf(TcFilterBpfOption::Flags(flags)) => {
                decides = flags.contains(TcBpfFlags::DirectAction);
            }
            _ => {}
        }
    }
    name.filter(|_| decides)
}

fn is_clsact(message: &TcMessage) -> bool {
    message.header.parent == TcHandle::CLSACT
}

fn message(index: u32, parent: TcHandle, handle: TcHandle) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = parent;
    message.header.handle = handle;
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(name: &str, info: u32, flags: TcBpfFlags) -> TcMessage {
        let mut filter = message(3, INGRESS, HANDLE);
        filter.header.info = info;
        let options = [TcFilterBpfOption::ProgName(name.to_owned()), TcFilterBpfOption::Flags(flags)];
        filter.attributes.push(TcAttribute::Options(options.map(TcOption::Bpf).into()));
        filter
    }

    #[test]
    fn a_program_is_ours_if_it_is_alone_decides_and_names_the_devices_of_now() {
        let index = |name: &str| (name == "vxlan0").then_some(4);
        let flags = TcBpfFlags::DirectAction;
        let ours = filter("droveway aa vxlan0=4", FIRST_OF_IPV4, flags);
        assert_eq!(digest(std::slice::from_ref(&ours), index), "droveway aa");
        for others in [
            vec![],
            vec![ours.clone(), ours.clone()],
            vec![filter("droveway aa vxlan0=5", FIRST_OF_IPV4, flags)],
            vec![filter("droveway aa tun0=4", FIRST_OF_IPV4, flags)],
            vec![filter("droveway aa vxlan0", FIRST_OF_IPV4, flags)],
            vec![filter("droveway aa vxlan0=4", FIRST_OF_IPV4 + (1 << 16), flags)],
            vec![filter("droveway aa vxlan0=4", FIRST_OF_IPV4, TcBpfFlags::empty())],
        ] {
            assert_eq!(digest(&others, index), ALTERED, "{others:?}");
        }
    }
}
