//! From a data directory to a running server, and down again.
//!
//! A first start makes, in this order: the store's file, the CA's key and certificate, the server's key, then in one
//! transaction the environment with the `managed` network, and at last the admin key's file and its hash in the store.
//! Every step is taken up again by the next start if this one was cut short, and nothing that was made is made anew.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use model::api::Role;
use model::{EnvironmentId, Epoch, MANAGED_CIDR, MANAGED_NETWORK, NetworkId, NetworkSpec};
use tokio::net::TcpListener;

use crate::app::{App, now};
use crate::ca::Ca;
use crate::feed::{Shared, feed};
use crate::files::{self, DataDir};
use crate::keys::{ApiKey, Keys, put};
use crate::outbox::Outbox;
use crate::state::State;
use crate::store::{Compare, Ended, EtcdStore, Op, SqliteStore, Store, StoreError, Txn};
use crate::tls::ServerCertificate;
use crate::upkeep::Upkeep;
use crate::{Config, Error, Ready, StoreChoice, name, presence, secret, serve, tls, upkeep};

/// The admin key's name in the store.
pub(crate) const ADMIN: &str = "admin";
/// What every key of people begins with.
pub(crate) const KEY_PREFIX: &str = "dwk1.";
/// How often the clock is looked at for the server's certificate: a clock may be set at any time.
const CLOCK: Duration = Duration::from_secs(1);
/// A key is not shorter than this: the prefix and 256 bits.
const KEY_LEN: usize = 48;

/// Why a server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its operator wants it to.
    Asked,
    Store(Ended),
    /// Another goes by its name.
    Name,
}

/// Runs a server until `shutdown` is ready. `ready` is called once, when it listens.
pub async fn run(
    config: Config,
    ready: impl FnOnce(Ready),
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    check_domain(&config.domain)?;
    config.urls.iter().try_for_each(|url| check_url(url))?;
    let data = DataDir::open(&config.data_dir)?;
    let store = open_store(&data, &config.store).await?;
    let epoch = store.epoch();
    let environment = EnvironmentId::default();
    let limits = config.limits.clone().fit();
    let keys = Keys(&environment);
    let first_start = value(&*store, &keys.environment()).await?.is_none();
    let known_ca = value(&*store, &keys.ca()).await?.map(|pem| String::from_utf8_lossy(&pem).into_owned());
    let ca = Ca::load_or_make(&data, !first_start, known_ca.as_deref(), config.lives)?;
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.map_err(|error| Error::Listen { address: config.listen, error })?;
    let address = listener.local_addr().map_err(|error| Error::Listen { address: config.listen, error })?;
    let identity = ca.server(&data, &config.names, &local_addresses(address.ip()))?;
    // Before servers kept a name of their own, they were called by their key.
    let before = tls::key_of(&identity.certificate).map(|key| key.to_string()).unwrap_or_default();
    let certificate = Arc::new(ServerCertificate::new(identity)?);
    let tls = tls::config(&ca, certificate.clone())?;
    let store_file = matches!(config.store, StoreChoice::Embedded).then(|| data.path(files::STORE));
    let upkeep = Upkeep::open(limits, &config.data_dir, store_file.as_deref(), certificate);
    let unwritable_log =
        |error| Error::File { what: "write the audit log in", path: config.data_dir.clone(), error };
    let upkeep = upkeep.map_err(unwritable_log)?;
    if first_start {
        make_environment(&*store, &environment, &ca).await?;
    }
    keep_ca(&data, &*store, &environment, &ca).await?;
    keep_admin_key(&data, &*store, &environment, &config.store).await?;
    let shares_store = matches!(config.store, StoreChoice::Etcd(_));
    let before = before.get(..16).unwrap_or_default();
    let name = name::take(&data, &*store, &environment, &config.urls, shares_store, before).await?;
    let state = State::load(&*store).await.map_err(fault)?;
    let outbox = Outbox::new(&name.text);
    outbox.recall(&state, &config.data_dir).map_err(unwritable_log)?;
    let shared = Arc::new(Shared::new(state));
    let mut feeder = tokio::spawn(feed(store.clone(), shared.clone()));
    let ca_fingerprint = ca.fingerprint();
    let called = (name.text.clone(), shares_store);
    let app = Arc::new(App::new(store, shared, ca, (config.domain, config.retain), called, upkeep, outbox));
    tracing::info!(%address, ca = %ca_fingerprint, first_start, "the server listens");
    ready(Ready { address, ca: ca_fingerprint, first_start, admin_key_file: data.path(files::ADMIN_KEY) });
    let mut why = End::Asked;
    let end = async {
        tokio::select! {
            () = shutdown => {}
            // It follows the store for as long as there is one.
            ended = &mut feeder => why = End::Store(ended.unwrap_or(Ended::Gone)),
            () = name::hold(&app, &environment, &name) => why = End::Name,
        }
    };
    let (serving, served) = tokio::sync::oneshot::channel::<()>();
    let serve = async {
        tokio::select! {
            () = serve::serve(listener, tls, app.clone(), end) => {}
            never = keep_certificate(&app, &data, &config.names, address.ip()) => match never {},
            never = presence::keep(&app, &environment) => match never {},
            never = upkeep::look_after_store(&app) => match never {},
        }
        drop(serving);
    };
    // Lines on their way into the log get there, and are known to be there.
    tokio::join!(serve, app.outbox.run(&app.shared, &app.upkeep.audit, served));
    if why == End::Asked {
        presence::note(&app, &environment).await;
    }
    // What cannot be written now is written at the next start; what is another's by now is written by that one.
    if why != End::Name {
        app.outbox.write(&app.shared, &app.upkeep.audit).await;
    }
    if why == End::Asked {
        name::leave(&app, &environment, &name).await;
    }
    drop(app);
    if let End::Store(why) = why {
        return Err(ended(&data, &config.store, &epoch, why));
    }
    feeder.abort();
    // The feeder holds the store: its file is closed when the feeder is gone, and the lock only after that.
    drop(feeder.await);
    if why == End::Name {
        return Err(Error::Superseded(config.data_dir));
    }
    tracing::info!("the server stopped");
    drop(data);
    Ok(())
}

/// Has the server's certificate renewed when two thirds of its life are over, for ever.
async fn keep_certificate(app: &App, data: &DataDir, names: &[String], listen: IpAddr) -> Infallible {
    loop {
        tokio::time::sleep(CLOCK).await;
        if !app.upkeep.certificate.is_due(now()) {
            continue;
        }
        let renewed = app.ca.server(data, names, &local_addresses(listen));
        match renewed.and_then(|identity| app.upkeep.certificate.renew(identity)) {
            Ok(()) => tracing::info!("the server's certificate was renewed"),
            Err(error) => tracing::error!(%error, "the server's certificate cannot be renewed; trying again"),
        }
    }
}

/// Opens the store that the operator wants, or makes it where there is none.
async fn open_store(data: &DataDir, choice: &StoreChoice) -> Result<Arc<dyn Store>, Error> {
    let epoch = Epoch::from_random(secret::random()?);
    match choice {
        StoreChoice::Embedded => {
            let path = data.path(files::STORE);
            // The store is on disk before there is a CA: one that is blank beside a CA was cut off, or came without its -wal.
            if data.path(files::CA_CERTIFICATE).exists() {
                if !path.exists() {
                    return Err(Error::Missing(path));
                }
                if SqliteStore::is_blank(&path).map_err(|error| Error::Store(error.to_string()))? {
                    return Err(Error::Empty(path));
                }
            }
            data.touch(files::STORE)?;
            let store = SqliteStore::open(&path, epoch);
            Ok(Arc::new(store.map_err(|error| Error::Store(error.to_string()))?))
        }
        StoreChoice::Etcd(config) => {
            let fault = |error| Error::Etcd(config.url.to_string(), error);
            if let Some(set_back) = data.read(files::SET_BACK)? {
                // Another life was begun, or whoever starts this server again and again makes nothing right.
                let known = EtcdStore::existing(config).await.map_err(fault)?;
                if known.is_none_or(|known| known.epoch().to_string() == set_back.trim()) {
                    return Err(Error::SetBack(choice.to_string()));
                }
            }
            Ok(Arc::new(EtcdStore::open(config, epoch).await.map_err(fault)?))
        }
    }
}

/// Why the server cannot go on. An etcd that was set back is remembered: nobody may serve that life of it any more.
fn ended(data: &DataDir, store: &StoreChoice, epoch: &Epoch, why: Ended) -> Error {
    match why {
        Ended::SetBack { .. } => {
            if let Err(error) = data.write(files::SET_BACK, &format!("{epoch}\n")) {
                tracing::error!(%error, "do not start this server again before its store was restored");
            }
            Error::SetBack(store.to_string())
        }
        Ended::Replaced | Ended::Gone => Error::Ended(why.to_string()),
    }
}

async fn value(store: &dyn Store, key: &str) -> Result<Option<Vec<u8>>, Error> {
    let (_, all) = store.range(key).await.map_err(fault)?;
    Ok(all.into_iter().find(|kv| kv.key == key).map(|kv| kv.value))
}

async fn make_environment(store: &dyn Store, environment: &EnvironmentId, ca: &Ca) -> Result<(), Error> {
    let (created, keys) = (now(), Keys(environment));
    let internal =
        |what: &dyn std::fmt::Display| Error::Store(format!("cannot make the first network: {what}"));
    let name = MANAGED_NETWORK.parse().map_err(|e| internal(&e))?;
    let spec = NetworkSpec::new(name, MANAGED_CIDR.parse().map_err(|e| internal(&e))?);
    let network =
        spec.validate(NetworkId::from_random(secret::random()?), 1, created).map_err(|e| internal(&e))?;
    let mut puts = vec![
        put(keys.environment(), &serde_json::json!({ "created": created })),
        put(keys.network(&network.id), &network),
        put(keys.network_name(&network.name), &network.id),
    ];
    if let model::Driver::Vxlan { vni, port } = network.driver {
        puts.push(put(keys.vni(port, vni), &network.id));
    }
    let mut puts = puts.into_iter().collect::<Result<Vec<_>, _>>().map_err(|e| internal(&e))?;
    puts.push(Op::Put(keys.ca(), ca.pem().into()));
    store.txn(Txn::new(vec![Compare::Absent(keys.environment())], puts)).await.map_err(fault)?;
    tracing::info!(%environment, network = MANAGED_NETWORK, "made the environment");
    Ok(())
}

/// The store knows the CA's certificate: servers that come later take it from there, and one that made a CA of its own at
/// the same moment finds that it was not the first.
async fn keep_ca(
    data: &DataDir,
    store: &dyn Store,
    environment: &EnvironmentId,
    ca: &Ca,
) -> Result<(), Error> {
    let place = Keys(environment).ca();
    let put = vec![Op::Put(place.clone(), ca.pem().into())];
    store.txn(Txn::new(vec![Compare::Absent(place.clone())], put)).await.map_err(fault)?;
    let same = value(store, &place).await?.is_some_and(|known| known == ca.pem().as_bytes());
    if same { Ok(()) } else { Err(Error::OtherCa(data.path(files::CA_CERTIFICATE))) }
}

fn unwritable(error: serde_json::Error) -> Error {
    Error::Store(error.to_string())
}

/// Makes the store's admin key that of the file, and the file where there is none. So whoever may write the directory,
/// and with it the CA's key, changes the admin key by removing the file and starting the server again. Of several servers
/// only the first makes one: the others take theirs from a file, if they are given one.
async fn keep_admin_key(
    data: &DataDir,
    store: &dyn Store,
    environment: &EnvironmentId,
    choice: &StoreChoice,
) -> Result<(), Error> {
    let place = Keys(environment).api_key(ADMIN);
    let known = value(store, &place).await?;
    let shared = matches!(choice, StoreChoice::Etcd(_));
    let key = match data.read(files::ADMIN_KEY)? {
        Some(key) if !key.trim().is_empty() => key.trim().to_owned(),
        _ if shared && known.is_some() => return Ok(()),
        _ => {
            let key = format!("{KEY_PREFIX}{}", secret::secret()?);
            data.write(files::ADMIN_KEY, &format!("{key}\n"))?;
            key
        }
    };
    if !key.starts_with(KEY_PREFIX) || key.len() < KEY_LEN || key.contains(char::is_whitespace) {
        return Err(Error::BadAdminKey(data.path(files::ADMIN_KEY)));
    }
    let hash = secret::sha256(key.as_bytes());
    if known.is_some_and(|kv| serde_json::from_slice(&kv).is_ok_and(|known: ApiKey| known.hash == hash)) {
        return Ok(());
    }
    let key = ApiKey { hash, created: now(), role: Role::Admin, expires: None };
    let op = put(place, &key).map_err(unwritable)?;
    store.txn(Txn::new(vec![], vec![op])).await.map_err(fault)?;
    tracing::info!(%environment, file = %data.path(files::ADMIN_KEY).display(), "the admin key is that of the file");
    Ok(())
}

fn fault(error: StoreError) -> Error {
    Error::Store(error.to_string())
}

fn check_url(url: &str) -> Result<(), Error> {
    let rest = url.strip_prefix("https://").map(|rest| rest.trim_end_matches('/'));
    let good = rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(['/', '?', '#', '@', ' ', ',']));
    if good { Ok(()) } else { Err(Error::BadUrl(url.to_owned())) }
}

fn check_domain(domain: &str) -> Result<(), Error> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let good = domain.len() <= 128 && domain.split('.').all(label);
    if good { Ok(()) } else { Err(Error::BadDomain(domain.to_owned())) }
}

/// What browsers and curl may have in the address bar. Our own clients ask for [`model::SERVER_NAME`].
fn local_addresses(listen: IpAddr) -> Vec<IpAddr> {
    let mut addresses = BTreeSet::from([IpAddr::from([127, 0, 0, 1]), listen]);
    if listen.is_unspecified() {
        addresses.remove(&listen);
        for interface in nix::ifaddrs::getifaddrs().into_iter().flatten() {
            let Some(address) = interface.address else { continue };
            if let Some(v4) = address.as_sockaddr_in() {
                addresses.insert(v4.ip().into());
            } else if let Some(v6) = address.as_sockaddr_in6()
                && !v6.ip().is_unicast_link_local()
            {
                addresses.insert(v6.ip().into());
            }
        }
    }
    addresses.into_iter().take(64).collect()
}
