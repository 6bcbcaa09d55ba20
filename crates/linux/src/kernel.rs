//! The kernel as the reconciler holds it: one mirror of all namespaces, one way to change them.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::{Mac, NetworkId};
use netlink_packet_route::RouteNetlinkMessage::SetLink;
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::link::LinkAttribute;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use plan::object::Ifname;
use plan::{Key, Object, Place, Scope, State, Step};

use crate::error::{At, Error, StepError};
use crate::link::Site;
use crate::mirror::Shown;
use crate::namespace::{Namespace, get_link};
use crate::netlink::{Requests, request};
use crate::netns::{self, Netns};
use crate::watch::Watch;
use crate::{address, arp, bpf, link, nft, route, sysctl};

/// What the file of each router's namespace begins with.
pub const NETNS_PREFIX: &str = "droveway-";

/// The namespaces of this host: observed, changed, waited for. One thread owns it.
#[derive(Debug)]
pub struct Kernel {
    netns_dir: PathBuf,
    host: Namespace,
    routers: BTreeMap<NetworkId, Router>,
    shown: Shown,
    watch: Watch,
    waker: Arc<EventFd>,
}

#[derive(Debug)]
struct Router {
    name: String,
    inode: (u64, u64),
    namespace: Namespace,
}

/// Why [`Kernel::wait`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// Something happened in a namespace: look at [`Kernel::observe`].
    Kernel,
    /// Someone called [`Waker::wake`].
    Waker,
    /// Nothing happened in that time.
    Timeout,
}

/// Wakes the thread that waits in [`Kernel::wait`].
#[derive(Debug, Clone)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// Makes the present or the next [`Kernel::wait`] return [`Woken::Waker`].
    pub fn wake(&self) {
        // Fails only when it is woken already, 2^64 - 2 times.
        let _ = self.0.write(1);
    }
}

impl Kernel {
    /// Opens the host's namespace, which is the calling thread's, and the routers bound in `netns_dir`. A router that
    /// was left half made is removed.
    pub fn open(netns_dir: &Path) -> Result<Self, Error> {
        fs::create_dir_all(netns_dir)
            .map_err(|error| Error::io(format!("make directory {}", netns_dir.display()), &error))?;
        let mut kernel = Self::of_host(netns_dir)?;
        for name in kernel.router_files()? {
            kernel.adopt(&name)?;
        }
        Ok(kernel)
    }

    /// The same for somebody who only looks: nothing is made or removed. The files that are called like a router's
    /// namespace and are none come beside.
    pub fn look(netns_dir: &Path) -> Result<(Self, Vec<String>), Error> {
        let mut kernel = Self::of_host(netns_dir)?;
        let mut strays = Vec::new();
        for name in kernel.router_files()? {
            match kernel.recognise(&name)? {
                Some((network, opened)) => kernel.enter(network, &name, opened)?,
                None => strays.push(name),
            }
        }
        Ok((kernel, strays))
    }

    fn of_host(netns_dir: &Path) -> Result<Self, Error> {
        let waker = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| Error::errno("make an event counter", errno))?;
        let mut kernel = Self {
            netns_dir: netns_dir.to_owned(),
            host: Namespace::open(Place::Host, Netns::current()?)?,
            routers: BTreeMap::new(),
            shown: Shown::new(),
            watch: Watch::open(netns_dir)?,
            waker: Arc::new(waker),
        };
        kernel.host.drain(&mut kernel.shown)?;
        Ok(kernel)
    }

    /// What there is: takes in all events that wait, and reads those sysctls in `wanted` that are not yet known.
    pub fn observe(&mut self, wanted: &State) -> Result<&State, Error> {
        if self.watch.drain()? {
            self.forget_unbound();
        }
        self.host.drain(&mut self.shown)?;
        for router in self.routers.values_mut() {
            router.namespace.drain(&mut self.shown)?;
        }
        self.read_sysctls(wanted)?;
        Ok(&self.shown.state)
    }

    /// What changed in the state since this was last called: what is worth diffing again. All of it at first, and after
    /// very many changes.
    pub fn take_changes(&mut self) -> Scope {
        self.shown.take_changes()
    }

    /// Whether an address of the host came or went since this was last called, ours between host and routers apart.
    pub fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.host.mirror.moved)
    }

    /// What was there at the last [`Self::observe`].
    pub fn state(&self) -> &State {
        &self.shown.state
    }

    /// Reads everything anew; sysctls on the next [`Self::observe`].
    pub fn resync(&mut self) -> Result<(), Error> {
        self.watch.drain()?;
        self.forget_unbound();
        self.host.resync(&mut self.shown)?;
        for router in self.routers.values_mut() {
            router.namespace.resync(&mut self.shown)?;
        }
        Ok(())
    }

    /// Does exactly one step. Doing it again is fine. What it changes shows at the next [`Self::observe`].
    pub fn apply(&mut self, step: &Step) -> Result<(), StepError> {
        let outcome = match step {
            Step::Remove(place, key) => self.remove(place, key),
            Step::Add(place, key, want) => self.make(place, key, want, None),
            Step::Change(place, key, want, have) => self.make(place, key, want, Some(have)),
        };
        outcome.map_err(|source| StepError::new(step, source))
    }

    /// Waits until something happens; without end if there is no timeout.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Woken, Error> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let events = self.routers.values().map(|router| &router.namespace).chain([&self.host]);
            let mut fds: Vec<PollFd<'_>> = [self.waker.as_fd(), self.watch.as_fd()]
                .into_iter()
                .chain(events.flat_map(|ns| [ns.route_events.as_fd(), ns.nft_events.as_fd()]))
                .map(|fd: BorrowedFd<'_>| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
                // Up to the next millisecond: a shorter wait would end early and go round.
                let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut fds, timeout) {
                Ok(0) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Ok(Woken::Timeout);
                }
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) if fds.first().and_then(PollFd::any) == Some(true) => {
                    let _ = self.waker.read();
                    return Ok(Woken::Waker);
                }
                Ok(_) => return Ok(Woken::Kernel),
                Err(errno) => return Err(Error::errno("wait for events", errno)),
            }
        }
    }

    /// What wakes [`Self::wait`] from other threads.
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.waker))
    }

    /// The host's own namespace.
    pub fn host_netns(&self) -> &Netns {
        &self.host.ns
    }

    /// Which of these namespaces has that device and inode ([`Netns::inode`]), if one has.
    pub fn whose(&self, inode: (u64, u64)) -> Option<Place> {
        let router = self.routers.iter().find(|(_, router)| router.inode == inode);
        let is_host = || self.host.ns.inode().is_ok_and(|host| host == inode);
        router.map(|(network, _)| Place::Router(network.clone())).or_else(|| is_host().then_some(Place::Host))
    }

    /// The namespace of a router, to open sockets in.
    pub fn router_netns(&self, network: &NetworkId) -> Option<&Netns> {
        self.routers.get(network).map(|router| &router.namespace.ns)
    }

    /// Tells the containers of a router that an address of the network is at `mac` now. Nothing is changed here.
    pub fn announce(&self, network: &NetworkId, address: IpAddr, mac: Mac) -> Result<(), Error> {
        match self.router_netns(network) {
            Some(netns) => arp::announce(netns, "br0", address, mac),
            None => Ok(()),
        }
    }

    /// The routers that are there, with the names of their namespaces.
    pub fn routers(&self) -> impl Iterator<Item = (&NetworkId, &str)> {
        self.routers.iter().map(|(network, router)| (network, router.name.as_str()))
    }

    fn make(&mut self, place: &Place, key: &Key, want: &Object, have: Option<&Object>) -> Result<(), Error> {
        if let (Place::Router(network), Key::Netns, Object::Netns { name }) = (place, key, want) {
            return self.make_router(network, name);
        }
        let (mut site, shown) = self.site(place)?;
        site.home.drain(shown)?;
        match (key, want) {
            (Key::Table(family), Object::Table(table)) => {
                nft::load(&site.home.ns, *family, table)?;
                site.home.drain(shown)?;
                site.home.mirror.stale.tables.remove(family);
                site.home.reread_table(shown, *family, true)
            }
            (Key::Link(name), Object::Link(want)) => match have {
                Some(Object::Link(have)) => link::change(&mut site, shown, name, want, have),
                Some(_) | None => link::add(&mut site, shown, name, want),
            },
            (Key::Sysctl(path), Object::Sysctl(value)) => {
                sysctl::write(&site.home.ns, path, value)?;
                site.home.mirror.set(shown, key.clone(), Some(want.clone()));
                Ok(())
            }
            (Key::Address(name, address), Object::Address) => {
                let index = site.home.index(name)?;
                let request = address::addition(index, *address, AddressFlags::Noprefixroute);
                let answer = site.home.route.request(request);
                answer.map(drop).map_err(|refusal| refusal.to_error(format!("add {address} to {name}")))
            }
            (Key::Rule(priority), Object::Rule(rule)) => route::add_rule(site.home, *priority, rule),
            (Key::Neighbour(name, address), Object::Neighbour(mac)) => {
                let index = site.home.index(name)?;
                route::add_neighbour(site.home, index, *address, *mac)
            }
            (Key::Fdb(name, mac), Object::Fdb(via)) => {
                let index = site.home.index(name)?;
                route::add_fdb(site.home, index, *mac, *via)
            }
            (Key::Route(table, destination), Object::Route(want)) => {
                route::add(site.home, *table, *destination, want)
            }
            (Key::Element(set, fields), Object::Element(value)) => {
                let added = nft::add(&mut site.home.nft, *set, fields, value, have.is_some());
                added.map_err(|refusal| {
                    let error = refusal.to_error(format!("add to nft set {}", set.name()));
                    if error.is(Errno::ENOENT) {
                        error.with_remedy("its table has to be loaded first")
                    } else {
                        error
                    }
                })
            }
            (Key::Program(device), Object::Program(program)) => bpf::attach(site.home, device, program),
            (Key::Netns, _) => Err(Error::words("make a namespace", "the host's own is always there")),
            _ => Err(Error::words("apply a step", "its key and its object are of different kinds")),
        }
    }

    fn remove(&mut self, place: &Place, key: &Key) -> Result<(), Error> {
        if let (Place::Router(network), Key::Netns) = (place, key) {
            return self.remove_router(network);
        }
        if matches!(place, Place::Router(network) if !self.routers.contains_key(network)) {
            return Ok(());
        }
        let (site, shown) = self.site(place)?;
        let home = site.home;
        home.drain(shown)?;
        match key {
            Key::Table(family) => {
                nft::unload(&mut home.nft, *family)?;
                home.mirror.stale.tables.insert(*family);
                home.drain(shown)
            }
            Key::Link(name) => link::remove(&mut home.route, name)
                .map(drop)
                .map_err(|refusal| refusal.to_error(format!("remove device {name}"))),
            // Nobody knows what it was before; it is only no longer looked after.
            Key::Sysctl(_) => {
                home.mirror.set(shown, key.clone(), None);
                Ok(())
            }
            Key::Address(name, address) => match home.mirror.index(name) {
                Some(index) => match home.route.request(address::removal(index, *address)) {
                    Err(refusal) if !matches!(refusal.errno, Errno::EADDRNOTAVAIL | Errno::ENODEV) => {
                        Err(refusal.to_error(format!("remove {address} from {name}")))
                    }
                    Ok(_) | Err(_) => Ok(()),
                },
                None => Ok(()),
            },
            Key::Rule(priority) => route::remove_rule(home, *priority),
            Key::Neighbour(name, address) => match home.mirror.index(name) {
                Some(index) => route::remove_neighbour(home, index, *address),
                None => Ok(()),
            },
            Key::Fdb(name, mac) => match home.mirror.index(name) {
                Some(index) => route::remove_fdb(home, index, *mac),
                None => Ok(()),
            },
            Key::Route(table, destination) => route::remove(home, *table, *destination),
            Key::Element(set, fields) => nft::remove(&mut home.nft, *set, fields)
                .map_err(|refusal| refusal.to_error(format!("remove from nft set {}", set.name()))),
            Key::Program(device) => bpf::detach(home, device),
            Key::Netns => Err(Error::words("remove a namespace", "the host's own stays")),
        }
    }

    fn site(&mut self, place: &Place) -> Result<(Site<'_>, &mut Shown), Error> {
        let site = match place {
            Place::Host => Site { home: &mut self.host, host: None },
            Place::Router(network) => match self.routers.get_mut(network) {
                Some(router) => Site { home: &mut router.namespace, host: Some(&mut self.host) },
                None => return Err(Error::words(format!("find {}", At(place)), "it is not there")),
            },
        };
        Ok((site, &mut self.shown))
    }

    fn make_router(&mut self, network: &NetworkId, name: &str) -> Result<(), Error> {
        if !name.starts_with(NETNS_PREFIX) || name.contains('/') {
            let attempted = format!("make network namespace {name:?}");
            return Err(Error::words(attempted, format!("a router's name begins with {NETNS_PREFIX}")));
        }
        match self.routers.get(network) {
            Some(router) if router.name == name && self.is_bound(router) => return Ok(()),
            Some(_) => self.remove_router(network)?,
            None => {}
        }
        if self.netns_dir.join(name).exists() {
            self.adopt(name)?;
            if self.routers.get(network).is_some_and(|router| router.name == name) {
                return Ok(());
            }
            netns::remove(&self.netns_dir, name)?;
            self.forget_unbound();
        }
        let ns = Netns::create_bound(&self.netns_dir, name)?;
        let marked = ns.run(|| {
            let alias = LinkAttribute::IfAlias(network.as_str().to_owned());
            let mark = link::set_up(link::named(&Ifname::new("lo"), [alias]), true);
            let answer = Requests::open()?.request(request(SetLink(mark), 0));
            answer.map(drop).map_err(|refusal| refusal.to_error(format!("bring up lo in {name}")))
        });
        match marked.and_then(|marked| marked).and_then(|()| self.enter(network.clone(), name, ns)) {
            Ok(()) => Ok(()),
            Err(error) => {
                let _ = netns::remove(&self.netns_dir, name);
                Err(error)
            }
        }
    }

    fn remove_router(&mut self, network: &NetworkId) -> Result<(), Error> {
        let Some(router) = self.routers.get(network) else { return Ok(()) };
        // Its name may be another's by now.
        if self.is_bound(router) {
            netns::remove(&self.netns_dir, &router.name)?;
        }
        self.forget(network);
        Ok(())
    }

    /// Takes over the router that is bound under that name, or removes what is no router.
    fn adopt(&mut self, name: &str) -> Result<(), Error> {
        if let Some((network, opened)) = self.recognise(name)? {
            return self.enter(network, name, opened);
        }
        tracing::warn!(name, "removing a router that was left half made");
        netns::remove(&self.netns_dir, name)
    }

    /// The router that is bound under that name, unless it is known under another one.
    fn recognise(&self, name: &str) -> Result<Option<(NetworkId, Netns)>, Error> {
        let found = match Netns::open(&self.netns_dir.join(name)) {
            Ok(opened) => {
                opened.run(alias_of_lo)??.parse::<NetworkId>().ok().map(|network| (network, opened))
            }
            // A file that is no namespace.
            Err(error) if error.is(Errno::EINVAL) => None,
            Err(error) => return Err(error),
        };
        Ok(found.filter(|(network, _)| !self.routers.contains_key(network)))
    }

    fn enter(&mut self, network: NetworkId, name: &str, ns: Netns) -> Result<(), Error> {
        let place = Place::Router(network.clone());
        let inode = ns.inode()?;
        let mut namespace = Namespace::open(place.clone(), ns)?;
        namespace.drain(&mut self.shown)?;
        self.shown.set((place, Key::Netns), Some(Object::Netns { name: name.to_owned() }));
        self.routers.insert(network, Router { name: name.to_owned(), inode, namespace });
        Ok(())
    }

    fn forget(&mut self, network: &NetworkId) {
        if let Some(mut router) = self.routers.remove(network) {
            // The kernel takes a namespace apart some time after its last user; its devices would be in the way until
            // then. None there is fine.
            let _ = link::remove_all(&mut router.namespace.route);
            router.namespace.mirror.drop_from(&mut self.shown, |_| true);
        }
    }

    /// Forgets routers whose file was removed: our sockets would keep such a namespace alive.
    fn forget_unbound(&mut self) {
        let gone: Vec<_> = self
            .routers
            .iter()
            .filter(|(_, router)| !self.is_bound(router))
            .map(|(network, _)| network.clone())
            .collect();
        for network in gone {
            tracing::warn!(%network, "the namespace of a router was removed by someone else");
            self.forget(&network);
        }
    }

    fn is_bound(&self, router: &Router) -> bool {
        netns::inode_at(&self.netns_dir.join(&router.name)) == Some(router.inode)
    }

    fn router_files(&self) -> Result<Vec<String>, Error> {
        let attempted = || format!("list {}", self.netns_dir.display());
        let entries = fs::read_dir(&self.netns_dir).map_err(|error| Error::io(attempted(), &error))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::io(attempted(), &error))?;
            names.extend(entry.file_name().into_string().ok().filter(|name| name.starts_with(NETNS_PREFIX)));
        }
        names.sort();
        Ok(names)
    }

    fn read_sysctls(&mut self, wanted: &State) -> Result<(), Error> {
        let namespaces = self.routers.values().map(|router| &router.namespace).chain([&self.host]);
        for namespace in namespaces {
            let place = &namespace.place;
            let unknown: Vec<_> = wanted
                .range((place.clone(), Key::Sysctl(String::new()))..)
                .map_while(|(name, object)| match (name, object) {
                    ((of, Key::Sysctl(path)), Object::Sysctl(value)) if of == place => {
                        Some((name, path, value))
                    }
                    _ => None,
                })
                .filter(|(name, _, _)| !self.shown.state.contains_key(*name))
                .map(|(_, path, value)| (path.clone(), value.clone()))
                .collect();
            if unknown.is_empty() {
                continue;
            }
            for (path, value) in sysctl::read(&namespace.ns, unknown)? {
                namespace.mirror.set(&mut self.shown, Key::Sysctl(path), value.map(Object::Sysctl));
            }
        }
        Ok(())
    }
}

fn alias_of_lo() -> Result<String, Error> {
    let mut requests = Requests::open()?;
    let lo = get_link(&mut requests, &Ifname::new("lo"))
        .map_err(|refusal| refusal.to_error("read the alias of lo"))?;
    let alias = lo.into_iter().flat_map(|lo| lo.attributes).find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => Some(alias),
        _ => None,
    });
    Ok(alias.unwrap_or_default())
}
