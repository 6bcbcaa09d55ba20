//! The SA table, and the way in which control gives it to workers.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use crate::{Inbound, InnerPolicy};

/// A value that control replaces and workers read without waiting.
///
/// Each worker has a [`Reader`] with an `Arc` of its own, so that reading writes to no shared cache line: it is one
/// load of a word that changes only with the value. No reader can miss a change because somebody else is in the middle of
/// something, which one that goes to sleep then would not find out: each version says itself which one came after it.
#[derive(Debug)]
pub struct Published<T> {
    /// For control alone.
    latest: Mutex<Arc<Version<T>>>,
}

#[derive(Debug)]
struct Version<T> {
    value: Arc<T>,
    next: OnceLock<Arc<Version<T>>>,
}

impl<T> Version<T> {
    fn new(value: T) -> Arc<Self> {
        Arc::new(Self { value: Arc::new(value), next: OnceLock::new() })
    }
}

impl<T> Published<T> {
    /// Begins with this value.
    pub fn new(value: T) -> Self {
        Self { latest: Mutex::new(Version::new(value)) }
    }

    /// The value of now. For control; workers have a [`Reader`].
    pub fn load(&self) -> Arc<T> {
        Arc::clone(&self.latest().value)
    }

    /// Makes a new value of the old one and puts it in its place. Concurrent updates follow one another; `make` has to leave
    /// this value alone.
    pub fn update(&self, make: impl FnOnce(&T) -> T) {
        let mut latest = self.latest();
        let next = Version::new(make(&latest.value));
        // Control has the lock, and what is the latest has no next one.
        let _ = latest.next.set(Arc::clone(&next));
        let old = std::mem::replace(&mut *latest, next);
        drop(latest);
        // Freed, if nobody reads it any more, with no lock that others wait for.
        drop(old);
    }

    /// A worker's view.
    pub fn reader(&self) -> Reader<T> {
        Reader { version: Arc::clone(&self.latest()) }
    }

    fn latest(&self) -> MutexGuard<'_, Arc<Version<T>>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker's view of a [`Published`] value.
///
/// It keeps what it read alive, and all that came after it: a worker that is about to sleep should be woken after a change,
/// and call [`Reader::get`], so that the keys of removed SAs are zeroed. (Until then [`Inbound::stop`] and
/// [`crate::Outbound::stop`] see to it that they are of no use.)
#[derive(Debug)]
pub struct Reader<T> {
    version: Arc<Version<T>>,
}

impl<T> Reader<T> {
    /// The newest value: at least the one of each [`Published::update`] that came back before this was called.
    #[inline]
    pub fn get(&mut self) -> &Arc<T> {
        while let Some(next) = self.version.next.get() {
            self.version = Arc::clone(next);
        }
        &self.version.value
    }
}

impl<T> Drop for Reader<T> {
    fn drop(&mut self) {
        // Versions go one by one, and not each inside the one before it, however many there are.
        self.get();
    }
}

/// An inbound SA with what goes with it.
#[derive(Debug)]
pub struct Entry<C> {
    /// The SA; it stays the same when policy or context change.
    pub sa: Arc<Inbound>,
    /// What may come out of it.
    pub policy: Arc<InnerPolicy>,
    /// What the caller needs to know of it: peer, network, device.
    pub context: C,
}

/// Inbound SAs by SPI. Never changed: a change is a new table, published by swap.
#[derive(Debug)]
pub struct SaTable<C> {
    by_spi: HashMap<u32, Entry<C>, BuildHasherDefault<SpiHasher>>,
}

impl<C> SaTable<C> {
    /// A table of these. Of two with one SPI the later stays.
    pub fn new(entries: impl IntoIterator<Item = Entry<C>>) -> Self {
        Self { by_spi: entries.into_iter().map(|entry| (entry.sa.spi().get(), entry)).collect() }
    }

    /// The entry for an SPI as it is on the wire.
    #[inline]
    pub fn get(&self, spi: u32) -> Option<&Entry<C>> {
        self.by_spi.get(&spi)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_spi.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_spi.is_empty()
    }

    /// All entries, in no order.
    pub fn entries(&self) -> impl Iterator<Item = &Entry<C>> {
        self.by_spi.values()
    }
}

impl<C: Clone> SaTable<C> {
    /// A table with this entry too, or in place of the one with its SPI.
    #[must_use]
    pub fn with(&self, entry: Entry<C>) -> Self {
        Self::new(self.entries().cloned().chain([entry]))
    }

    /// A table without this SPI.
    #[must_use]
    pub fn without(&self, spi: u32) -> Self {
        Self::new(self.entries().filter(|entry| entry.sa.spi().get() != spi).cloned())
    }
}

impl<C> Default for SaTable<C> {
    fn default() -> Self {
        Self::new([])
    }
}

impl<C: Clone> Clone for Entry<C> {
    fn clone(&self) -> Self {
        Self { sa: Arc::clone(&self.sa), policy: Arc::clone(&self.policy), context: self.context.clone() }
    }
}

/// SPIs in the table are our own random numbers, so one multiplication spreads them.
#[derive(Default)]
struct SpiHasher(u64);

impl Hasher for SpiHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32((*byte).into());
        }
    }

    fn write_u32(&mut self, spi: u32) {
        self.0 = (self.0 ^ u64::from(spi)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KeyMaterial, Sequence, Spi, Suite};

    fn entry(spi: u32, context: u8) -> Entry<u8> {
        let material = KeyMaterial::new(Suite::Aes128Gcm16, &[7; 20]).unwrap();
        let spi = Spi::new(spi).unwrap();
        let sa = Arc::new(Inbound::new(spi, &material, Sequence::Extended).unwrap());
        Entry { sa, policy: Arc::default(), context }
    }

    #[test]
    fn a_table_finds_what_was_put_in_and_nothing_else() {
        let table = SaTable::new((0..1000).map(|n| entry(256 + n * 65_536, (n % 200) as u8)));
        assert_eq!(table.len(), 1000);
        assert_eq!(table.get(256 + 10 * 65_536).unwrap().context, 10);
        assert!(table.get(257).is_none() && table.get(0).is_none());
        let table = table.with(entry(300, 1)).with(entry(256, 99)).without(256 + 65_536);
        assert_eq!((table.len(), table.get(256).unwrap().context), (1000, 99));
        assert!(table.get(256 + 65_536).is_none());
    }

    #[test]
    fn readers_see_a_change_at_their_next_look_and_let_go_of_the_old() {
        let published = Arc::new(Published::new(SaTable::default()));
        let (mut one, mut other) = (published.reader(), published.reader());
        let entry = entry(300, 1);
        let weak = Arc::downgrade(&entry.sa);
        published.update(|table| table.with(entry));
        assert_eq!(one.get().len(), 1);
        assert_eq!(other.get().len(), 1);
        published.update(|table| table.without(300));
        assert!(one.get().is_empty());
        assert!(weak.upgrade().is_some(), "the other reader still has it");
        assert!(other.get().is_empty());
        assert!(weak.upgrade().is_none(), "and with it its keys are gone");
    }

    #[test]
    fn a_reader_neither_waits_for_control_nor_misses_what_it_published_before() {
        let published = Published::new(1);
        let mut reader = published.reader();
        published.update(|_| 2);
        let held = published.latest();
        assert_eq!(**reader.get(), 2, "whoever has the lock");
        drop(held);
        published.update(|_| {
            assert_eq!(**reader.get(), 2, "the next one is being made");
            3
        });
        assert_eq!(**reader.get(), 3);
    }
}
