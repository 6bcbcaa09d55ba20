//! The SA table, and the way in which control gives it to workers.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{Inbound, InnerPolicy};

/// A value that control replaces and workers read without waiting.
///
/// Each worker has a [`Reader`] with an `Arc` of its own, so that reading writes to no shared cache line: it is one
/// load of a number that changes only with the value. A reader that meets control in the middle of the swap goes on
/// with the old value and looks again at its next packet.
#[derive(Debug)]
pub struct Published<T> {
    generation: AtomicU64,
    /// Held for the moments of a swap or a clone, by readers only if nobody else has it.
    current: Mutex<Arc<T>>,
    /// Held by control while it makes a new value of the old.
    writer: Mutex<()>,
}

impl<T> Published<T> {
    /// Begins with this value.
    pub fn new(value: T) -> Self {
        Self { generation: AtomicU64::new(0), current: Mutex::new(Arc::new(value)), writer: Mutex::new(()) }
    }

    /// The value of now. For control; workers have a [`Reader`].
    pub fn load(&self) -> Arc<T> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes a new value of the old one and puts it in its place. Concurrent updates follow one another.
    pub fn update(&self, make: impl FnOnce(&T) -> T) {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let next = Arc::new(make(&self.load()));
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, next);
        self.generation.fetch_add(1, Ordering::Release);
        drop(current);
        // Freed, if nobody reads it any more, with no lock that a reader could meet.
        drop(old);
    }

    /// A worker's view.
    pub fn reader(self: &Arc<Self>) -> Reader<T> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        Reader {
            seen: self.generation.load(Ordering::Acquire),
            value: Arc::clone(&current),
            source: Arc::clone(self),
        }
    }
}

/// A worker's view of a [`Published`] value.
///
/// It keeps what it read alive: a worker that is about to sleep should be woken after a change, and call
/// [`Reader::get`], so that the keys of removed SAs are zeroed. (Until then [`Inbound::stop`] and
/// [`crate::Outbound::stop`] see to it that they are of no use.)
#[derive(Debug)]
pub struct Reader<T> {
    source: Arc<Published<T>>,
    seen: u64,
    value: Arc<T>,
}

impl<T> Reader<T> {
    /// The newest value that can be had without waiting.
    #[inline]
    pub fn get(&mut self) -> &Arc<T> {
        if self.source.generation.load(Ordering::Acquire) != self.seen {
            self.renew();
        }
        &self.value
    }

    #[cold]
    fn renew(&mut self) {
        if let Ok(current) = self.source.current.try_lock() {
            self.seen = self.source.generation.load(Ordering::Acquire);
            self.value = Arc::clone(&current);
        }
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
    fn a_reader_does_not_wait_for_a_writer_that_holds_the_lock() {
        let published = Arc::new(Published::new(1));
        let mut reader = published.reader();
        published.update(|_| 2);
        let held = published.current.lock().unwrap();
        assert_eq!(**reader.get(), 1, "goes on with what it has");
        drop(held);
        assert_eq!(**reader.get(), 2);
    }
}
